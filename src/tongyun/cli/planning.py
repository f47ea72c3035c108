"""What `tongyun plan` does with its flags: asks `codesign.plan`, and writes the answer.

Knows the flags by name and type, not how they are read: describing them takes longer than
many an answer.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tongyun.cli.planned import as_json, show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tongyun.codesign.demand import Demand
    from tongyun.codesign.explain import Explanation
    from tongyun.codesign.plan import Answer
    from tongyun.codesign.space import Question
    from tongyun.codesign.tails import Tails
    from tongyun.model.config import ModelConfig
    from tongyun.model.graph import Precision
    from tongyun.specs import ChipSpec, PriceSpec


def carry_out(given: dict[str, Any]) -> None:
    """Answer the flags of `tongyun plan`, each by its name."""
    wanted = _check(given)
    asked = {"isl": given["isl"], "osl": given["osl"]}
    demand = _demand(given)
    if demand is not None:
        given["isl"], given["osl"] = demand.isl, demand.osl
    import tongyun.codesign.plan  # noqa: F401  # loading it is no part of the search that is timed

    begin = time.perf_counter()
    answers = [_search(given, name, count) for name, count in wanted]
    seconds = time.perf_counter() - begin
    main = answers[0] if given["chip"] is not None else None
    explanation = _explanation(main) if given["explain"] else None
    rivals = answers if given["compare"] is not None else []
    felt = _tails(main, demand)
    if given["json"]:
        from tongyun.cli.felt import as_json as felt_json
        from tongyun.report import to_json

        found = _object(main, explanation, rivals, seconds)
        print(to_json(found if felt is None else found | {"demand": felt_json(felt)}))
    else:
        _show_all(main, explanation, rivals, seconds)
        if felt is not None:
            from tongyun.cli.felt import show as show_felt

            show_felt(felt)
    _write({**given, **asked}, answers)
    _refuse(main, answers)
    if felt is not None and felt.best is None:
        from tongyun.errors import Infeasible

        raise Infeasible(f"no plan for {felt.demand.name}: {felt.limit}")


def _check(given: dict[str, Any]) -> list[tuple[str, int]]:
    """Chips to plan on, the main one first; flags that ask for a main one without naming it are refused."""
    from tongyun.cli.compared import named
    from tongyun.errors import InputError

    chip, chips, compare = given["chip"], given["chips"], given["compare"]
    if chip is None:
        if compare is None:
            raise InputError("nothing to plan on: name a chip with --chip, or several with --compare")
        for flag in ("explain", "launch"):
            if given[flag]:
                raise InputError(f"--{flag} is about one chip's plan: name it with --chip")
    for flag in ("engine", "checkpoint", "draft_weights"):
        if given[flag] is not None and given["launch"] is None:
            raise InputError(f"--{flag.replace('_', '-')} says what --launch writes, which is not given")
    check_drafts(given)
    if given["draft_weights"] is not None and given["draft_tokens"] is None:
        raise InputError("--draft-weights is about drafts, which are not asked for: give --draft-tokens")
    rest = [] if compare is None else named(compare, chips)
    return rest if chip is None else [(chip, chips), *(pair for pair in rest if pair != (chip, chips))]


def _demand(given: dict[str, Any]) -> Demand | None:
    """The load of at most one of --workload and --trace, or of --rate with --isl and --osl."""
    from tongyun.errors import InputError

    sources = [flag for flag in ("workload", "trace") if given[flag] is not None]
    sized = [flag for flag in ("isl", "osl") if given[flag] is not None]
    if len(sources) > 1 or (sources and sized):
        told = ", ".join(f"--{flag}" for flag in (*sources, *sized))
        raise InputError(f"{told}: give --isl and --osl, or one of --workload and --trace")
    if not sources and len(sized) < 2:
        raise InputError("how long are requests? give --isl and --osl, --workload or --trace")
    rate = given["rate"]
    if not sources and rate is None:
        return None
    if given["chip"] is None:
        raise InputError("--rate, --workload and --trace are about one chip's plan: name it with --chip")
    if given["prefix_hit"] is not None:
        why = "a demand's requests bring their own prefixes"
        raise InputError(f"--prefix-hit is for equal requests: {why}; leave it out")
    from tongyun.codesign.demand import of_rate, of_trace, of_workload

    if given["workload"] is not None:
        from tongyun.cloud.workload import Workload
        from tongyun.specs import find_workload

        return of_workload(Workload.from_spec(find_workload(given["workload"])), rate)
    if given["trace"] is not None:
        from tongyun.cloud.trace import read_trace
        from tongyun.codesign.demand import REQUESTS

        return of_trace(read_trace(given["trace"], limit=REQUESTS), rate, name=str(given["trace"]))
    return of_rate(rate, given["isl"], given["osl"])


def _tails(main: Answer | None, demand: Demand | None) -> Tails | None:
    """Percentiles under the demand, where there is one and a plan to play."""
    if main is None or main.best is None or demand is None:
        return None
    from tongyun.codesign.tails import tails

    return tails(main, demand)


def _search(given: dict[str, Any], chip: str, chips: int) -> Answer:
    from tongyun.codesign.plan import plan as search
    from tongyun.units import MS

    ttft_ms, tpot_ms = given["ttft_ms"], given["tpot_ms"]
    question = ask(
        {**given, "chip": chip, "chips": chips, "pools": given["pools"] or "both"},
        ttft_s=None if ttft_ms is None else ttft_ms * MS,
        tpot_s=None if tpot_ms is None else tpot_ms * MS,
        dtypes=(given["dtype"], given["kv_dtype"]),
        usd_per_chip_hour=given["usd_per_chip_hour"],
    )
    answer = search(question)
    if question.kernels == "lowered":
        from tongyun.chip.kernels import kernels
        from tongyun.specs import Corner

        for corner in Corner:
            priced = kernels(question.at(corner))
            if priced is not None:
                priced.close()
    return answer


def _explanation(answer: Answer | None) -> Explanation | None:
    from tongyun.codesign.explain import explain

    if answer is None or answer.best is None:
        return None
    return explain(answer.question, answer.best.plan)


def _object(
    main: Answer | None, explanation: Explanation | None, rivals: list[Answer], seconds: float
) -> dict[str, Any]:
    """The JSON of everything asked for; `compare` alone where no main chip is named."""
    found = {} if main is None else as_json(main, seconds)
    if explanation is not None:
        from tongyun.cli.explained import as_json as explained

        found["explain"] = explained(explanation)
    if rivals:
        rows = [as_json(answer, seconds) for answer in rivals]
        drop = ("pareto", "seconds")
        found["compare"] = [{k: v for k, v in row.items() if k not in drop} for row in rows]
    return found if main is not None else found | {"seconds": seconds}


def _show_all(
    main: Answer | None, explanation: Explanation | None, rivals: list[Answer], seconds: float
) -> None:
    from tongyun.report import show as put

    if main is not None:
        show(main, seconds)
    if explanation is not None:
        from tongyun.cli.explained import tables

        put(*tables(explanation))
    if rivals:
        from tongyun.cli.compared import compare_table

        put(compare_table(rivals))


def _write(given: dict[str, Any], answers: list[Answer]) -> None:
    """Launch files of the main plan, where there is one, and the HTML report."""
    if given["launch"] is not None and answers[0].best is not None:
        _write_launch(given, answers[0])
    if given["html"] is not None:
        from tongyun.codesign.launch import write_files
        from tongyun.codesign.page import page

        place: Path = given["html"]
        text = page(answers, _explanation(answers[0]), command=command(given))
        write_files({place.name: text}, place.parent, force=given["force"])
        print(f"wrote {place}", file=sys.stderr)


def _write_launch(given: dict[str, Any], answer: Answer) -> None:
    from tongyun.codesign.launch import TARGETS, Deployment, launch_files, write_files

    assert answer.best is not None
    is_path = Path(given["model"]).exists()
    deployment = Deployment(
        question=answer.question,
        offer=answer.best,
        command=command(given),
        weights=given["model"] if is_path else answer.question.model.name,
        checkpoint=given["checkpoint"],
        draft=given["draft_weights"],
    )
    targets = list(TARGETS) if given["engine"] is None else [given["engine"]]
    found = launch_files(deployment, targets)
    for place in write_files(found.files, given["launch"], force=given["force"]):
        print(f"wrote {place}", file=sys.stderr)
    for name, why in found.refused.items():
        print(f"no {name}: {why}", file=sys.stderr)


def _refuse(main: Answer | None, answers: list[Answer]) -> None:
    """Exit with no where the main chip, or without one every chip, has no plan."""
    from tongyun.errors import Infeasible

    failed = [main] if main is not None else answers
    if any(answer.best is not None for answer in failed):
        return
    question = failed[0].question
    on = ", ".join(f"{answer.question.chips} × {answer.question.chip.name}" for answer in failed)
    raise Infeasible(f"no plan for {question.model.name} on {on}: {failed[0].limit}")


def command(given: Mapping[str, Any], name: str = "plan") -> str:
    """The command line that these flags come from, in their order; those that are off are left out."""
    words = ["tongyun", name]
    for key, value in given.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words += [flag, text]
    return shlex.join(words)


def check_drafts(given: Mapping[str, Any]) -> None:
    """InputError where only one of the flags about drafts is there."""
    from tongyun.errors import InputError

    if (given["draft_tokens"] is None) != (given["acceptance"] is None):
        raise InputError("--draft-tokens and --acceptance go together: how many, and how often one is right")


def ask(
    given: dict[str, Any],
    *,
    ttft_s: float | None,
    tpot_s: float | None,
    dtypes: tuple[str | None, str | None],
    usd_per_chip_hour: float | None,
    precision: Precision | None = None,
) -> Question:
    """The question behind the flags; wrong names raise `InputError` with near ones.

    A whole `precision`, where it is known, stands for `dtypes`.
    """
    from tongyun.codesign.space import Question
    from tongyun.model.config import ModelConfig
    from tongyun.specs import find_chip, find_model

    raw, name = find_model(given["model"])
    config = ModelConfig.from_hf(raw, name=name, file=given["model"])
    spec = find_chip(given["chip"])
    dtype, kv_dtype = dtypes
    return Question(
        model=config,
        chip=spec,
        chips=given["chips"],
        isl=given["isl"],
        osl=given["osl"],
        precision=precision or _precision(config, spec, dtype, kv_dtype),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        price=_price(spec.name, usd_per_chip_hour),
        pools=given.get("pools") or "mixed",
        kernels=given.get("kernels") or "modelled",
        prefix_hit=given.get("prefix_hit") or 0.0,
        draft_tokens=given.get("draft_tokens") or 0,
        acceptance=given.get("acceptance") or 0.0,
    )


def _precision(config: ModelConfig, spec: ChipSpec, dtype: str | None, kv_dtype: str | None) -> Precision:
    """As asked for; a calibrated machine runs our engine, which keeps the types it was measured with."""
    from tongyun.chip.calibrated import engine_precision
    from tongyun.codesign.space import default_dtype
    from tongyun.model.graph import Precision

    if spec.calibration is not None and dtype is None and kv_dtype is None:
        return engine_precision(spec.calibration)
    return Precision.of(dtype or default_dtype(config, spec), kv_dtype)


def _price(chip: str, usd_per_chip_hour: float | None) -> PriceSpec | None:
    """The user's price, else the catalogue's, else none."""
    from tongyun.errors import InputError
    from tongyun.specs import Figure, PriceSpec, find_price, names
    from tongyun.units import Source

    if usd_per_chip_hour is None:
        return find_price(chip) if chip in names("prices") else None
    if not 0 < usd_per_chip_hour < float("inf"):
        raise InputError(f"--usd-per-chip-hour must be a positive number, got {usd_per_chip_hour}")
    figure = Figure.of(usd_per_chip_hour, Source.ASSUMED, "--usd-per-chip-hour")
    return PriceSpec(name=chip, chip=chip, basis="assumed", chip_hour=figure)
