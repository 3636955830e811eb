"""exit_status.py FOLDER SCRIPT WORDS: the script, and in FOLDER/status-RANK with which status it ended."""

import os
import runpy
import sys
from pathlib import Path

_, folder, *sys.argv = sys.argv
status = "an exception"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    status = 0
except SystemExit as e:
    status = e.code
    raise
finally:
    rank = os.environ.get("RANK") or os.environ.get("PMI_RANK") or "0"
    Path(folder, f"status-{rank}").write_text(str(status or 0))
