"""A manifest against the schema that Kubernetes itself holds it to: a CustomResourceDefinition, or a live API server.

Kubernetes drops fields that a schema does not know; here they are errors.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError

SERVER_S = 15
EXPECTED = "a CustomResourceDefinition, such as KubeRay's ray.io_rayjobs.yaml"


def read_crd(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The kind that a CustomResourceDefinition defines, and a strict JSON schema for each of its API versions.

    Raises:
        UserError: it is none.
    """
    try:
        crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # KubeRay's has a megabyte
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, expected=EXPECTED) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML ({' '.join(str(error).split())})", where=path, expected=EXPECTED) from error
    try:
        assert crd["kind"] == "CustomResourceDefinition"
        group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
        versions = {f"{group}/{v['name']}": strict(v["schema"]["openAPIV3Schema"]) for v in crd["spec"]["versions"]}
    except (AssertionError, KeyError, TypeError, AttributeError) as error:
        raise UserError("no definition of a kind of object", where=path, expected=EXPECTED) from error
    return kind, versions


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as a JSON schema that refuses fields it does not know."""
    kept = (
        "type",
        "required",
        "enum",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "pattern",
    )
    found: dict[str, Any] = {name: schema[name] for name in kept if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if "properties" in schema:
        found["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if isinstance(schema.get("additionalProperties"), Mapping):
        found["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        found["items"] = strict(schema["items"])
    if schema.get("nullable") and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    return found


def ask_server(path: Path) -> None:
    """Let the API server that kubectl is set up for check a file, strictly and without applying it.

    Raises:
        UserError: it refuses the file, or cannot be asked.
    """
    if shutil.which("kubectl") is None:
        raise UserError("kubectl is not installed", where="--server", hint="use --crd FILE instead")
    command = ["kubectl", "apply", "--dry-run=server", "--validate=strict", f"--request-timeout={SERVER_S - 5}s"]
    try:
        done = subprocess.run(
            [*command, "-f", str(path)], capture_output=True, text=True, timeout=SERVER_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        what = f"the API server did not answer in {SERVER_S} s"
        raise UserError(what, where="--server", hint="use --crd FILE instead") from error
    if done.returncode != 0:
        raise UserError(f"the API server refuses it: {' '.join(done.stderr.split())[:400]}", where=path)
