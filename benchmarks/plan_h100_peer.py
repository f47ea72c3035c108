"""aiconfigurator's prediction for measured rows; run by `plan_h100.py` with the peer's own Python.

Reads a JSON list of rows from standard input, writes an object of [TTFT, TPOT] in ms by id. The
arguments are those of its own accuracy check (tools/accuracy_regression_testing in its repository):
a version of an engine it has no tables of is asked without version. Rows it refuses are left out.
"""

import json
import sys
from contextlib import redirect_stdout

NAMES = ("batch_size", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")


def arguments(row):
    found = {
        "model_path": row["model_path"],
        "system_name": row["system"],
        "mode": "agg",
        "backend_name": row["backend"],
        "backend_version": row["backend_version"] or None,
        "isl": int(row["isl"]),
        "osl": int(row["osl"]),
        "gemm_quant_mode": row["gemm_quant_mode"] or None,
        "moe_quant_mode": row["moe_quant_mode"] or None,
    }
    return found | {name: int(row[name]) for name in NAMES if row.get(name)}


def say(asked):
    """Its answer; without version where it has no tables of that version."""
    from aiconfigurator.cli.api import cli_estimate

    with redirect_stdout(sys.stderr):
        try:
            return cli_estimate(**asked)
        except ValueError as error:
            if asked["backend_version"] is None or "Failed to load perf database" not in str(error):
                raise
            return cli_estimate(**(asked | {"backend_version": None}))


def main():
    given = json.load(sys.stdin)
    answers = {}
    for row in given["rows"]:
        asked = arguments(row)
        # It looks models up on the hub; the folder has the same config.json.
        for model in (row["model_path"], given["configs"].get(row["model_path"])):
            try:
                said = say(asked | {"model_path": model})
            except Exception as error:  # whatever it cannot answer is counted by the caller
                print(f"{row['id']}: {error}", file=sys.stderr)
            else:
                answers[row["id"]] = [said.ttft, said.tpot]
                break
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
