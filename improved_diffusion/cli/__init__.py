"""The command line: flags, config.json, logs and exit codes."""
