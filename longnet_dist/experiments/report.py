"""The report of an experiment: JSON with all records, a Markdown table, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.experiments.kinds import KINDS, Record
from longnet_dist.experiments.plan import Experiment
from longnet_dist.telemetry.plot_style import hardware, save


def write_report(experiment: Experiment, output: Path) -> list[Path]:
    """Write the report of all records that are there.

    Args:
        experiment: whose records.
        output: folder of all experiments.

    Returns:
        the files ``NAME.json``, ``NAME.md`` and ``NAME.png``; none if there is no record.
    """
    folder = experiment.folder(output)
    records = read_records(experiment, folder)
    if not records:
        return []
    kind, files = KINDS[experiment.kind], [folder / f"{experiment.name}.{suffix}" for suffix in ("json", "md", "png")]
    head = {"experiment": experiment.name, "title": experiment.title, "about": experiment.about}
    text = json.dumps(head | {"smoke": experiment.smoke, "records": records}, indent=1, allow_nan=False)
    write_text(files[0], text + "\n")
    write_text(files[1], markdown(experiment, records))
    machines = dict.fromkeys(hardware(record["environment"]) for record in records)
    subtitle = "; ".join(machines) + (" · smoke size, no result" if experiment.smoke else "")
    save(kind.draw(experiment, records, subtitle), files[2])
    return files


def read_records(experiment: Experiment, folder: Path) -> list[dict[str, Any]]:
    """Return the records in a folder, in the order of the experiment's runs and seeds."""
    files = (
        (folder / "results" / f"{name}-seed{seed}.json") for name, run in experiment.runs.items() for seed in run.seeds
    )
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def markdown(experiment: Experiment, records: Sequence[Record]) -> str:
    """Return the page of an experiment: what is asked, the command, the table and what it cost."""
    header, *rows = KINDS[experiment.kind].table(experiment, records)
    command = f"longnet experiment {experiment.name}{' --smoke' if experiment.smoke else ''}"
    seeds = max(len({record["seed"] for record in records if record["run"] == x["run"]}) for x in records)
    notes = [f"`{command}`"]
    if minutes := sum(record.get("device_minutes", 0.0) for record in records):
        notes.append(f"{minutes:.3g} device minutes of training")
    if seeds > 1:
        notes.append("± is the standard deviation over seeds")
    table = [header, ["---"] * len(header), *rows]
    lines = [f"# {experiment.title}", "", experiment.about, "", "; ".join(notes) + ".", ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table), ""])
