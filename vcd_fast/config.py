"""A run's configuration: sections that each floor defines for itself, composed, checked and turned into command-line options.

Order of precedence: the sections' defaults < preset (`--preset`) < YAML file (`--config`) < options. Unknown keys are refused. Every
leaf is an option of the same name (`training.learning_rate` is `--learning-rate`), so leaf names are unique over all sections.
"""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vcd_fast.data import DataSettings
from vcd_fast.models.base import FAMILIES, family
from vcd_fast.models.lora import LoRASettings
from vcd_fast.rewards.vcd import VCDRewardSettings
from vcd_fast.rollout.plan import RolloutSettings
from vcd_fast.training.settings import SECTIONS, RunConfig, TrainingSettings

Overlay = Mapping[str, Mapping[str, Any]]

SECTION_TITLES = {
    "model": "model: weights, size of the video, guidance",
    "lora": "lora: what is trained",
    "rollout": "rollout: how a video is made with gradients",
    "reward": "reward: what is maximised",
    "data": "data: pictures and prompts",
    "training": "training: how long, how fast, what is written",
}


def section_types(family_name: str) -> dict[str, type[BaseModel]]:
    """The settings class of every section for a model family."""
    return {
        "model": family(family_name).ModelSettings,
        "lora": LoRASettings,
        "rollout": RolloutSettings,
        "reward": VCDRewardSettings,
        "data": DataSettings,
        "training": TrainingSettings,
    }


def preset_names(family_name: str) -> list[str]:
    folder = resources.files("vcd_fast") / "presets" / family_name
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def compose(family_name: str, preset: str | None = None, *overlays: Overlay) -> RunConfig:
    """The configuration of a run; later overlays win.

    Raises:
        ValueError: unknown family, preset, section or key; a value out of range. All problems in one message.
    """
    config = RunConfig(family_name, preset, **compose_sections(family_name, preset, SECTIONS, *overlays))
    _check_together(config)
    return config


def _check_together(config: RunConfig) -> None:
    """What no section can see alone."""
    if config.model.dtype == "float16":
        raise ValueError("configuration: model.dtype: expected bfloat16 or float32 for training, got 'float16'")
    if config.rollout.offload in ("window", "both") and config.training.zero == 3:
        raise ValueError(
            f"configuration: rollout.offload: expected none or decode with training.zero 3, got {config.rollout.offload!r}: weights that are "
            "gathered for a step would be moved with what it keeps"
        )
    if config.model.quantization != "none" and config.training.zero == 3:
        raise ValueError(
            "configuration: model.quantization: expected none with training.zero 3, which shards weights itself, got "
            f"{config.model.quantization!r}; choose stage 0, 1 or 2"
        )
    try:
        config.reward.check_size(config.model.height, config.model.width)
    except ValueError as error:
        raise ValueError(f"configuration: {error}") from None
    most = config.model.num_frames - 1
    if config.reward.frames_per_step > most:
        raise ValueError(
            f"configuration: reward.frames_per_step: expected at most {most} for a clip of {most + 1} frames, "
            f"got {config.reward.frames_per_step}"
        )


def compose_sections(
    family_name: str, preset: str | None, wanted: Sequence[str], *overlays: Overlay
) -> dict[str, BaseModel]:
    """Only some sections of a run, for a command that needs no others; the rest of preset and overlays is still checked for
    names nobody knows. Errors as of `compose`."""
    types_of = section_types(family_name)
    layers = [load_preset(family_name, preset)] if preset is not None else []
    values: dict[str, dict[str, Any]] = {name: {} for name in types_of}
    problems = []
    for layer in [*layers, *overlays]:
        for section, entries in layer.items():
            if section not in types_of:
                problems.append(_unknown("section", section, types_of))
            elif not isinstance(entries, Mapping):
                problems.append(f"section {section}: expected keys and values, got {entries!r}")
            else:
                known = types_of[section].model_fields
                dotted = [f"{section}.{key}" for key in known]
                problems += [_unknown("key", f"{section}.{key}", dotted) for key in entries if key not in known]
                values[section].update({key: value for key, value in entries.items() if key in known})
    sections = {}
    for name in wanted:
        try:
            sections[name] = types_of[name](**values[name])
        except ValidationError as error:
            problems += [_explain(name, entry) for entry in error.errors()]
    if problems:
        several = ["what is wrong:", *problems] if len(problems) > 1 else problems
        raise ValueError("configuration: " + "\n  ".join(several))
    return sections


def load_preset(family_name: str, preset: str) -> dict[str, Any]:
    """The preset's sections as plain data.

    Raises:
        ValueError: no such preset; the message lists those there are.
    """
    known = preset_names(family_name)
    if preset not in known:
        raise ValueError(f"preset: expected one of {', '.join(known)} for the model {family_name}, got {preset!r}")
    text = (resources.files("vcd_fast") / "presets" / family_name / f"{preset}.yaml").read_text()
    return yaml.safe_load(text)


def load_file(path: str | Path) -> dict[str, Any]:
    """A YAML file's content.

    Raises:
        ValueError: not YAML, or not a mapping.
        OSError: cannot be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected sections ({', '.join(SECTIONS)}), got {type(content).__name__}")
    return content


def _unknown(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
    return f"unknown {what} {name}{hint}"


def _explain(section: str, entry: Mapping[str, Any]) -> str:
    """One of pydantic's findings in our form: name, expectation, what came."""
    name = ".".join([section, *map(str, entry["loc"])])
    if entry["type"] == "missing":
        return f"{name}: expected a value, got none"
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "value_error" and not entry["loc"]:
        return f"{section}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, got {entry['input']!r}"


# --- command line ------------------------------------------------------------------------------------------------------------------


TRAINING = "Fine-tune a LoRA of an image-to-video model on pictures alone, by backpropagating the Video Consistency Distance through the sampler."


def parse(
    argv: Sequence[str],
    prog: str,
    description: str = TRAINING,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[RunConfig, argparse.Namespace]:
    """Read the command line of a training run.

    Args:
        add_options: adds those that another command has besides.

    Returns:
        the configuration and the remaining switches (`dry_run`, `local_rank`, those of `add_options`).

    Raises:
        ValueError: see `compose`.
        SystemExit: `--help`, or options argparse refuses.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_leading_options(first)
    leading, _ = first.parse_known_args(argv)
    content = load_file(leading.config) if leading.config else {}
    family_name = leading.model or content.pop("family", None)
    preset = leading.preset or content.pop("preset", None)
    content.pop("family", None)
    content.pop("preset", None)

    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        usage="%(prog)s --model {wan,opensora} [--preset NAME] [--config FILE] [options]",
        description=f"{description} Precedence: defaults < --preset < --config < options.",
    )
    _add_leading_options(parser)
    if add_options is not None:
        add_options(parser)
    # Without a family only the help can be shown, and Wan's stands for it.
    destinations = _add_sections(parser, family_name or "wan", preset if family_name else None)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(_unknown("option", unknown[0], options))
    if family_name is None:
        raise ValueError(f"model: expected --model with one of {', '.join(FAMILIES)}, got none")
    given: dict[str, dict[str, Any]] = {}
    for destination, (section, key) in destinations.items():
        if hasattr(arguments, destination):
            value = getattr(arguments, destination)
            alone = isinstance(value, list) and len(value) == 1
            annotation = section_types(family_name)[section].model_fields[key].annotation
            # one word for an option that takes a name or a list of them is the name
            given.setdefault(section, {})[key] = value[0] if alone and str in typing.get_args(annotation) else value
    return compose(family_name, preset, content, given), arguments


def _add_leading_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--model", choices=list(FAMILIES), help="model family", default=argparse.SUPPRESS)
    group.set_defaults(model=None)
    group.add_argument(
        "--preset", metavar="NAME", default=None, help="named settings of the family; `tiny` runs on a laptop"
    )
    group.add_argument("--config", metavar="FILE", default=None, help="YAML file with the same sections and keys")
    group.add_argument("--dry-run", action="store_true", default=False, help="print the resolved plan and stop")
    group.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)


def _add_sections(parser: argparse.ArgumentParser, family_name: str, preset: str | None) -> dict[str, tuple[str, str]]:
    """One group of options per section; returns which option belongs to which key."""
    layer = load_preset(family_name, preset) if preset is not None and preset in preset_names(family_name) else {}
    destinations: dict[str, tuple[str, str]] = {}
    for section, kind in section_types(family_name).items():
        group = parser.add_argument_group(SECTION_TITLES[section])
        for key, field in kind.model_fields.items():
            if key in destinations:
                raise RuntimeError(f"{section}.{key} and {'.'.join(destinations[key])} would be the same option")
            destinations[key] = (section, key)
            default = layer.get(section, {}).get(key, field.get_default(call_default_factory=True))
            text = (field.description or "").replace("%", "%%")
            text += (
                f" (default: {default})".replace("%", "%%") if field.default is not None or default is not None else ""
            )
            options: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS, "help": text}
            choices, is_bool, is_list = _shape(field.annotation)
            if is_bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["metavar"] = "{" + ",".join(map(str, choices)) + "}" if choices else key.upper()
                options["nargs"] = "+" if is_list else None
                options["type"] = _converter(choices, optional=type(None) in typing.get_args(field.annotation))
            group.add_argument("--" + key.replace("_", "-"), **options)
    return destinations


def _converter(choices: Sequence[Any], optional: bool) -> Callable[[str], Any]:
    """Text stays text, pydantic converts and checks it so that file and command line are told the same things; only what has no
    other spelling (None, a choice that is a number) is looked up here."""
    table = {str(choice): choice for choice in choices}

    def convert(text: str) -> Any:
        return None if optional and text.lower() in ("none", "null") else table.get(text, text)

    return convert


def _shape(annotation: Any) -> tuple[tuple[Any, ...], bool, bool]:
    """(choices, is a switch, takes several values) of a field's type."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [_shape(member) for member in typing.get_args(annotation) if member is not type(None)]
        return (
            sum((choices for choices, _, _ in members), ()),
            all(switch for _, switch, _ in members),
            any(several for _, _, several in members),
        )
    if origin is typing.Literal:
        return typing.get_args(annotation), False, False
    return (), annotation is bool, origin in (list, tuple, Sequence) or annotation in (list, tuple)
