"""`cmfg config`: show, validate and list configurations."""

from __future__ import annotations

from dataclasses import asdict

import click

from cmfg_dgl.config import Config, describe_keys, recipe_files, recipes, to_yaml

from .options import config_options, json_option, verbosity_options
from .output import print_json, print_table

__all__ = ["command"]


@click.group("config")
def command() -> None:
    """Show, validate and list configurations.

    \b
    cmfg config show -c openmoji
    """


@command.command("show")
@config_options
@click.option("--keys", is_flag=True, help="Every key with its default and what it means, in place of the values.")
@json_option
@verbosity_options
def show(
    settings: Config,
    keys: bool,
    as_json: bool,
) -> None:
    """Print the whole configuration as it would be used, with the files that it is based on.

    \b
    cmfg config show -c openmoji training.epochs=5
    cmfg config show --keys
    """
    if keys and as_json:
        print_json([{"key": key, "default": default, "meaning": text} for key, default, text in describe_keys()])
    elif keys:
        print_table("configuration keys", ["key", "default", "meaning"], list(describe_keys()))
    elif as_json:
        print_json(asdict(settings))
    else:
        for path in recipe_files(click.get_current_context().params["config"])[:-1]:
            click.echo(f"# base: {path}")
        click.echo(to_yaml(settings), nl=False)


@command.command("validate")
@config_options
@json_option
@verbosity_options
def validate(
    settings: Config,
    as_json: bool,
) -> None:
    """Check a configuration; exit code 2 and one line if something is wrong.

    \b
    cmfg config validate -c mine.yaml
    """
    # There are settings, so they are valid.
    source = click.get_current_context().params["config"]
    if as_json:
        print_json({"valid": True, "config": source})
    else:
        click.echo(f"{source or 'defaults'}: valid")


@command.command("ls")
@json_option
@verbosity_options
def ls(as_json: bool) -> None:
    """List the recipes that ship with cmfg.

    \b
    cmfg config ls
    """
    if as_json:
        print_json({name: str(path) for name, path in recipes().items()})
    else:
        print_table("recipes (cmfg train -c NAME)", ["name", "file"], [[n, str(p)] for n, p in recipes().items()])
