"""A plan as files that start it: vLLM and SGLang scripts, Kubernetes manifests, a Ray Serve config."""

from tongyun.codesign.launch.deployment import Deployment
from tongyun.codesign.launch.files import TARGETS, Launch, launch_files
from tongyun.codesign.launch.write import write_files

__all__ = ["TARGETS", "Deployment", "Launch", "launch_files", "write_files"]
