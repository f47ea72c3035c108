"""Read command lines as an engine does, in that engine's own Python: `launch_check.py` runs this.

Standard input holds {"program": …, "cases": […]}, words of command lines or objects; standard output gets
a list of [verdict, reason]. An engine's flags are parsed by its own parser and resolved to its own
configuration, against the model's config.json and without a GPU: what needs a device or the weights is
not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Verdict = tuple[str, str]


def vllm() -> Callable[[list[str]], None]:
    """`vllm serve`'s parser, then the engine's configuration. Without a device the CPU's stands in, which
    has no say in the parallel, speculative and transfer parts."""
    from vllm import platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    if isinstance(platforms.current_platform, UnspecifiedPlatform):
        from vllm.platforms.cpu import CpuPlatform

        platforms._current_platform = CpuPlatform()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))

    def read(words: list[str]) -> None:
        args = parser.parse_args([*words, "--load-format", "dummy", "--skip-tokenizer-init"])
        args.model = args.model_tag
        validate_parsed_serve_args(args)
        AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)

    return read


def sglang() -> Callable[[list[str]], None]:
    """The server's parser, then the resolution of its arguments for CUDA."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="sglang.launch_server")
    ServerArgs.add_cli_args(parser)

    def read(words: list[str]) -> None:
        rest = ["--load-format", "dummy", "--skip-tokenizer-init", "--device", "cuda"]
        args = ServerArgs.from_cli_args(parser.parse_args([*words, *rest]))
        args.resolve_once()
        args.check_server_args()

    return read


def router(package: str) -> Callable[[list[str]], None]:
    """A router's parser, and its arguments read from it."""
    from importlib import import_module

    launch = import_module(f"{package}.launch_router")

    def read(words: list[str]) -> None:
        args = launch.parse_router_args(words)
        if not isinstance(args, launch.RouterArgs):
            raise TypeError(f"{package} read no RouterArgs")

    return read


def ray() -> Callable[[Any], None]:
    """Ray Serve's schema of a config file, and of its LLM applications' arguments."""
    from ray.llm._internal.serve.core.ingress.builder import LLMServingArgs
    from ray.llm._internal.serve.serving_patterns.data_parallel.builder import DPOpenAiServingArgs
    from ray.llm._internal.serve.serving_patterns.prefill_decode.builder import PDServingArgs
    from ray.serve.schema import ServeDeploySchema

    schemas = {
        "build_openai_app": LLMServingArgs,
        "build_dp_openai_app": DPOpenAiServingArgs,
        "build_pd_openai_app": PDServingArgs,
    }

    def read(config: Any) -> None:
        ServeDeploySchema.model_validate(config)
        for application in config["applications"]:
            schemas[application["import_path"].rsplit(":", 1)[-1]].model_validate(application["args"])

    return read


def kubernetes() -> Callable[[Any], None]:
    """The published schema of Kubernetes' own objects, and of a custom one where its definition is given."""
    import jsonschema
    import kubernetes_validate

    def read(case: Any) -> None:
        schema = case.get("schema")
        if schema is not None:
            jsonschema.Draft202012Validator(_closed(schema)).validate(case["object"])
        else:
            version = kubernetes_validate.latest_version()
            kubernetes_validate.validate(case["object"], version, strict=True)

    return read


def _closed(schema: Any) -> Any:
    """The same without room for keys that it does not name."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "additionalProperties" not in found:
        found["additionalProperties"] = bool(found.get("x-kubernetes-preserve-unknown-fields", False))
    return found


READERS: dict[str, Callable[[], Callable[[Any], None]]] = {
    "vLLM": vllm,
    "SGLang": sglang,
    "vllm-router": lambda: router("vllm_router"),
    "sglang-router": lambda: router("sglang_router"),
    "Ray": ray,
    "Kubernetes": kubernetes,
}


def verdict(read: Callable[[Any], None], case: Any) -> Verdict:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read(case)
    except SystemExit:
        return "refused", said.getvalue().strip().splitlines()[-1]
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return "refused", f"{type(error).__name__}: {' '.join(lines)[:400]}"
    return "accepted", ""


def main() -> None:
    asked = json.load(sys.stdin)
    # Engines print while they are read; only the verdicts may reach standard output.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    read = READERS[asked["program"]]()
    json.dump([verdict(read, case) for case in asked["cases"]], out)
    out.close()


if __name__ == "__main__":
    main()
