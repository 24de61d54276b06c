"""How a configuration is merged and written: a preset, then a YAML file, then ``key=value`` settings; the later wins.

Keys are dotted (``optim.lr``) and typed by the field that they name.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cab.config import (
    Config,
    LanguageConfig,
    RunConfig,
    Section,
    UserError,
    all_text,
    describe,
    known_name,
    nearest,
)
from cab.presets import ARMS, PRESETS

AnyConfig = typing.TypeVar("AnyConfig", bound=Config)

CONFIG = "config.yaml"  # the configuration in the folder of a run
PLACES = ("data.root", "data.path", "data.index", "data.cache", "teacher.weights")  # of files and folders


def resolve(
    preset: str | None = None, file: Path | None = None, settings: Iterable[str] = (), data: str | None = None
) -> RunConfig:
    """Merge a preset, a YAML file and ``key=value`` settings, the later over the earlier, into a checked Config.

    The preset is the one named, else the file's own ``preset`` key, else ``vision`` where there are ``data``, else
    ``digits``. ``data`` are the images or the text, as if the first of the settings named them.

    Raises:
        UserError: an unknown preset, arm or key, a value of the wrong type or range, a file that is not a mapping.
    """
    of_file = read(file) if file else {}
    preset = preset or of_file.get("preset") or ("digits" if data is None else "vision")
    known_name(preset, PRESETS, "preset")
    kind = PRESETS[preset].kind
    of_user = {**_source(kind, data), **dict(map(_setting, settings))}
    if "preset" in of_user:
        raise UserError(f"expected --preset {of_user['preset']}, got --set preset={of_user['preset']}")
    values = {**PRESETS[preset].overrides, **of_file, **of_user, "preset": preset}
    config: RunConfig = _build(kind, {key: _place(value) if key in PLACES else value for key, value in values.items()})
    for arm in config.arms:
        known_name(arm, ARMS, "arm")
        of_arm(config, arm)  # refuses an arm that nothing is left to learn for
        for key in of_user.keys() & ARMS[arm].overrides.keys():
            fixed = ARMS[arm].overrides[key]
            if fixed != flatten(config)[key]:
                raise UserError(
                    f"expected {key}={_plain(fixed)}, which arm '{arm}' fixes, got {of_user[key]!r}; "
                    "use --set arms=custom to choose it freely"
                )
    return config


def of_arm(config: AnyConfig, arm: str) -> AnyConfig:
    """The run with the values that the arm fixes."""
    return _build(type(config), {**flatten(config), **ARMS[arm].overrides, "arms": (arm,)})


def of_run(folder: Path) -> RunConfig:
    """The configuration of the run in a folder.

    Raises:
        UserError: no such folder, or not the folder of a run.
    """
    if not (folder / CONFIG).is_file():
        found = f"{folder} without {CONFIG}" if folder.is_dir() else f"no folder {folder}"
        raise UserError(f"expected the folder of a run, got {found}")
    return resolve(file=folder / CONFIG)


def read(file: Path) -> dict[str, Any]:
    """The dotted keys and the values of a YAML file."""
    import yaml

    if not file.is_file():
        raise UserError(f"expected a configuration file, got no file {file}")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"expected YAML in {file}, got {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected keys and values in {file}, got {type(content).__name__}")
    return dict(_flat(content))


def to_yaml(config: Config) -> str:
    """The configuration as YAML, each key with the line that explains it; ``read`` takes it back."""
    import yaml

    lines = []

    def write(section: Section, indent: str) -> None:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if isinstance(value, Section):
                lines.append(f"{indent}{field.name}:  # {(value.__doc__ or '').splitlines()[0]}")
                write(value, indent + "  ")
            else:
                text = yaml.safe_dump(_plain(value), default_flow_style=True).removesuffix("...\n").strip()
                lines.append(f"{indent}{field.name}: {text}  # {field.metadata['help']}")

    write(config, "")
    return "\n".join(lines) + "\n"


def flatten(config: Config) -> dict[str, Any]:
    """The dotted keys of a configuration, each with its value."""
    return dict(_flat(dataclasses.asdict(config)))


def _flat(nested: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _source(kind: type[Config], data: str | None) -> dict[str, str]:
    if data is None:
        return {}
    return (
        {"data.name": "files", "data.path": data}
        if kind is LanguageConfig
        else {"data.name": "folder", "data.root": data}
    )


def _place(value: Any) -> Any:
    """A path that holds wherever the run is gone on with; a name of what is not there, as it is."""
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else str(path) if value.startswith("~") else value


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"expected --set key=value, got {text!r}")
    return key.strip(), value.strip()


def _annotations(kind: type[Config]) -> dict[str, Any]:
    """The type of every dotted key."""
    found: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(kind).items():
        if isinstance(annotation, type) and issubclass(annotation, Section):
            inner = typing.get_type_hints(annotation)
            found |= {f"{name}.{key}": inner[key] for key in inner if not key.startswith("_")}
        elif not name.startswith("_"):
            found[name] = annotation
    return found


def _build(kind: type[AnyConfig], values: Mapping[str, Any]) -> AnyConfig:
    annotations = _annotations(kind)
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in values.items():
        if key not in annotations:
            raise UserError(f"expected a known key, got {key!r}{nearest(key, annotations)}")
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else top)[name or key] = _parse(key, annotations[key], value)
    hints = typing.get_type_hints(kind)
    return kind(**top, **{name: hints[name](**inner) for name, inner in sections.items()})


def _parse(key: str, annotation: Any, value: Any) -> Any:
    """The value as the field's type: text is read, a list becomes a tuple, a whole number may stand for a float."""
    if annotation == tuple[str, ...]:
        parts = value.strip("[]").split(",") if isinstance(value, str) else value
        return tuple(part.strip() for part in parts) if all_text(parts) else value
    if not isinstance(value, str):
        return float(value) if annotation is float and type(value) is int else value
    kinds = typing.get_args(annotation) or (annotation,)
    if type(None) in kinds and value.lower() in ("none", "null", ""):
        return None
    try:
        if bool in kinds:
            return {"true": True, "false": False}[value.lower()]
        if int in kinds:
            return int(value)
        if float in kinds:
            return float(value)
    except (KeyError, ValueError):
        raise UserError(f"expected {key} to be {describe(annotation)}, got {value!r}") from None
    return value
