"""The flags that commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from cmfg_dgl.config import load_config

__all__ = [
    "Verbosity",
    "WholeNumbers",
    "config_options",
    "force_option",
    "json_option",
    "run_argument",
    "verbosity_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Verbosity:
    """How much the person wants to hear; lives as long as the process."""

    quiet: bool = False
    verbose: bool = False


class WholeNumbers(click.ParamType[list[int]]):
    """Comma-separated whole numbers, none twice; they are called `name` and are at least `least`."""

    def __init__(self, name: str, least: int) -> None:
        self.name, self.least = name, least

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers, in the order given."""
        numbers = [int(part) if part.strip().isdecimal() else self.least - 1 for part in str(value).split(",")]
        if min(numbers) < self.least or len(set(numbers)) < len(numbers):
            example = ",".join(str(self.least + i) for i in range(3))
            self.fail(
                f"{value!r} are no {self.name}; write whole numbers from {self.least}, none twice, as in {example}",
                param,
                ctx,
            )
        return numbers


def verbosity_options(command: Command) -> Command:
    """Add `--quiet/-q` and `--verbose/-v`; they are read through `Verbosity`."""

    def store(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
        def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
            setattr(context.ensure_object(Verbosity), name, value)

        return callback

    command = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=store("verbose"),
        help="Full traceback on errors.",
    )(command)
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=store("quiet"),
        help="No progress, no log lines.",
    )(command)


def json_option(command: Command) -> Command:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def force_option(text: str) -> Callable[[Command], Command]:
    """Add `--force` with its meaning for this command."""
    return click.option("--force", is_flag=True, help=text)


def run_argument(command: Command) -> Command:
    """Add the run directory and overrides of its configuration."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")(command)
    return click.argument("run", type=click.Path())(command)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--config/-c`, `--seed`, `--device`, `--precision` and overrides; the command gets them as `settings`.

    A flag, also the command's own `--output-dir`, counts as the last override.
    """

    @functools.wraps(command)
    def with_settings(*args: Any, config: str | None, overrides: tuple[str, ...], **rest: Any) -> Any:
        flags = {f"run.{name}": rest.pop(name, None) for name in ("seed", "device", "precision", "output_dir")}
        given = [f"{key}={value}" for key, value in flags.items() if value is not None]
        return command(*args, settings=load_config(config, [*overrides, *given]), **rest)

    for option in (
        click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]..."),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Precision of matrix products."),
        click.option("--device", help="Torch device: cpu, cuda, cuda:1, ..."),
        click.option("--seed", type=click.IntRange(min=0), help="Seed of weights, batches and dropout."),
        click.option("-c", "--config", metavar="FILE|NAME", help="A YAML file or the name of a shipped recipe."),
    ):
        with_settings = option(with_settings)
    return with_settings
