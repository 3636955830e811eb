"""Print docs/flags.md: python -m improved_diffusion.cli.flag_table > docs/flags.md"""

from .. import options
from ..option_groups import Option, rows
from ..options import ScriptOptions
from ..utils.streams import show

SCRIPTS: dict[str, type[ScriptOptions]] = {
    "image_train": options.TrainOptions,
    "image_sample": options.SampleOptions,
    "image_nll": options.LikelihoodScriptOptions,
    "plan_timesteps": options.PlanScriptOptions,
    "image_eval": options.EvalOptions,
    "super_res_train": options.SuperResTrainOptions,
    "super_res_sample": options.SuperResSampleOptions,
}
HEAD = """# Flags

`python -m improved_diffusion.cli.flag_table > docs/flags.md` generates this file from `options.py`.
Counts may be written as `1e6`. For `prepare.py`, `convert.py`, `plot_progress.py` and `plot_nll.py` see `--help`.
"""


def flag_table() -> str:
    """All flags in Markdown: a section per group, a row per flag."""
    sections: dict[str, dict[Option, list[str]]] = {}  # {group: {option: scripts that have it}}
    for script, taken in SCRIPTS.items():
        for row in rows(taken):
            sections.setdefault(row.group, {}).setdefault(row, []).append(script)
    text = HEAD
    for group, found in sections.items():
        text += f"\n## {group.capitalize()}\n\n| flag | default | meaning | values | scripts |\n|---|---|---|---|---|\n"
        for row, scripts in found.items():
            default = "" if row.default in ("", None) else f"`{row.default}`"
            values = "True or False" if row.type is bool else row.valid or ""
            missing = [script for script in SCRIPTS if script not in scripts]
            where = ", ".join(scripts) if len(missing) > 1 else "all but ".join(["", *missing]) or "all"
            text += f"| `--{row.name}` | {default} | {row.help} | {values} | {where} |\n"
    return text


if __name__ == "__main__":
    show(flag_table().rstrip("\n"))
