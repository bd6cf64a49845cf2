"""The command ``cod``: one sub-command per thing a user does, JSON under ``--json``, honest exit codes.

Exit code 0: fine; 1: the work failed; 2: the input is wrong (every problem on its own line, no traceback,
before any process starts); 130: interrupted. This module only reads flags; what a command does is imported
when it runs, so that ``cod --help`` and the child processes start fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cod_async.errors import CodError, InputError, NumericsError, StoreError

app = typer.Typer(
    name="cod",
    help="Train LLM agents to connect the dots over long lifecycles of related tasks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
env_app = typer.Typer(help="Look at environments and play them with scripted policies.", no_args_is_help=True)
app.add_typer(env_app, name="env")

AsJson = Annotated[bool, typer.Option("--json", help="Answer as one JSON value on standard output.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a setting with a TOML value; repeatable."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


@app.command()
def train(
    configs: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG...", help="TOML files, left to right.")
    ] = None,
    overrides: Sets = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder, instead of run.name.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print configuration and plan, stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train: make the starting model, evaluate, train with actors and learner side by side, evaluate
    again.
    """
    from cod_async.commands.training import run_train

    code = run_train(
        configs or [], overrides or [], name=name, resume=resume, is_dry_run=dry_run, is_json=as_json
    )
    raise typer.Exit(code)


@app.command()
def bootstrap(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="TOML files, left to right.")],
    out: Annotated[Path, typer.Option(help="Model directory to make.")],
    overrides: Sets = None,
    progress: Annotated[Path | None, typer.Option(help="Write progress into this file, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the tiny starting model: format and note-taking only, no use of hints."""
    from cod_async.commands.training import run_bootstrap_command

    raise typer.Exit(
        run_bootstrap_command(configs, overrides or [], out=out, progress=progress, is_json=as_json)
    )


@app.command(name="eval")
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="RUN|MODEL_DIR", help="Run folder or model directory.")],
    config: Annotated[
        list[Path] | None, typer.Option(help="TOML files, instead of the run's settings.")
    ] = None,
    overrides: Sets = None,
    suite: Annotated[Path | None, typer.Option(help="TOML file that says what to play.")] = None,
    environment: Annotated[str | None, typer.Option(help="Evaluate on this environment.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of --environment.")] = None,
    pack_size: Annotated[int | None, typer.Option(help="Tasks in a lifecycle.")] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="cod: different tasks; ralph_sample, ralph_full: one task again and again."),
    ] = None,
    carry: Annotated[str | None, typer.Option(help="hint, transcript, none.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="train, held_out; repeatable. Default: both, or the suite's.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="normal, blanked, swapped, truth; repeatable.")
    ] = None,
    packs: Annotated[
        int | None, typer.Option(help="Packs per curve and seed; 0: the whole data set.")
    ] = None,
    lifecycles: Annotated[int | None, typer.Option(help="Lifecycles per pack.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of packs and sampling; repeatable.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Optimiser step of the weights; default the newest.")
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Sweep over a run: all, every:N, published, or steps like 0,20,40.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="What to call the weights.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Worker processes; default one per core, at most 2.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; the same one continues.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw the curves.")] = True,
    as_json: AsJson = False,
) -> None:
    """Evaluate: mean reward by position, with the hint as it is, blanked, swapped or true.

    What is finished is kept: after an interrupt or a kill the same command goes on where it was.
    """
    from cod_async.commands.evaluating import Request, run_eval

    code = run_eval(
        Request(
            source=source,
            configs=tuple(config or ()),
            overrides=tuple(overrides or ()),
            suite=suite,
            environment=environment,
            preset=preset,
            pack_size=pack_size,
            strategies=tuple(strategy or ()),
            carry=carry,
            splits=tuple(split or ()),
            controls=tuple(control or ()),
            num_packs=packs,
            lifecycles=lifecycles,
            seeds=tuple(seed or ()),
            step=step,
            checkpoints=checkpoints,
            label=label,
            num_processes=processes,
            out=out,
            has_plots=plots,
            is_json=as_json,
        )
    )
    raise typer.Exit(code)


@app.command()
def doctor(
    configs: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG...", help="TOML files, left to right.")
    ] = None,
    overrides: Sets = None,
    engine: Annotated[
        str, typer.Option(metavar="URL", help="An SGLang server, instead of the configuration's engine.")
    ] = "",
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model directory that the engine should serve.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with the server's api key.")
    ] = "",
    admin_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with the server's admin key.")
    ] = "",
    allow_updates: Annotated[
        bool,
        typer.Option("--allow-updates", help="May pause the server and load the weights it has once more."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at everything a run relies on: configuration, machine, environments, model, engine."""
    from cod_async.commands.doctor import Request, run_doctor

    request = Request(
        configs=tuple(configs or ()),
        overrides=tuple(overrides or ()),
        engine=engine,
        model_dir=model,
        api_key_env=api_key_env,
        admin_key_env=admin_key_env,
        allow_updates=allow_updates,
        is_json=as_json,
    )
    raise typer.Exit(run_doctor(request))


@env_app.command("list")
def env_list(as_json: AsJson = False) -> None:
    """List the environments and what is hidden in each."""
    from cod_async.commands.output import print_answer
    from cod_async.envs.commands import list_environments

    print_answer(list_environments(), as_json, "environments")


@env_app.command("show")
def env_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Environment, see cod env list.")],
    pack_seed: Annotated[int, typer.Option("--pack-seed", help="Seed of the hidden world.")] = 0,
    record: Annotated[str | None, typer.Option(metavar="JSON", help="Fields of one data record.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset; default the environment's.")] = None,
    position: Annotated[int, typer.Option(help="Task index in the pack.")] = 0,
    pack_size: Annotated[int | None, typer.Option("--pack-size", help="Tasks in the pack.")] = None,
    options: Annotated[str, typer.Option(help="Overrides of the preset's options, as JSON.")] = "{}",
    as_json: AsJson = False,
) -> None:
    """Show one task and its hidden world, exactly as a rollout gets them."""
    from cod_async.commands.output import print_answer
    from cod_async.envs.commands import show

    fields = None if record is None else _json_object("--record", record)
    overrides = _json_object("--options", options)
    answer = show(name, preset, pack_seed, fields, position, pack_size, overrides)
    print_answer(answer, as_json, name)


@env_app.command("play")
def env_play(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Environment, see cod env list.")],
    policy: Annotated[
        str, typer.Option(help="random or oracle, or another of the environment's policies.")
    ] = "random",
    packs: Annotated[int, typer.Option(help="Packs to play.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of packs and policy.")] = 0,
    preset: Annotated[str | None, typer.Option(help="Preset; default the environment's.")] = None,
    pack_size: Annotated[int | None, typer.Option("--pack-size", help="Tasks in a pack.")] = None,
    strategy: Annotated[
        str, typer.Option(help="cod: different tasks; ralph_sample, ralph_full: one task again and again.")
    ] = "cod",
    split: Annotated[
        str, typer.Option(help="train, or held_out: worlds and records training never has.")
    ] = "train",
    options: Annotated[str, typer.Option(help="Overrides of the preset's options, as JSON.")] = "{}",
    as_json: AsJson = False,
) -> None:
    """Play whole packs with a scripted policy: the floor (random) and the ceiling (oracle) of a curve."""
    from cod_async.commands.output import print_json, print_table
    from cod_async.envs.commands import play

    answer = play(
        name,
        preset,
        pack_size,
        policy,
        packs,
        seed,
        options=_json_object("--options", options),
        strategy=strategy,
        split=split,
    )
    if as_json:
        print_json(answer)
        return
    rows = [{"task": position, **point} for position, point in enumerate(answer["reward_by_position"])]
    print_table(rows, f"{name}, {policy}: {answer['episodes_per_s']:,.0f} episodes/s")


@app.command()
def credit(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="Rewards of lifecycles; see the README.")],
    as_json: AsJson = False,
) -> None:
    """Compute returns, baselines, advantages and RED temperatures of a file of rewards."""
    from cod_async.algo.credit import credit_file
    from cod_async.commands.output import print_json, print_table

    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read, {error}; give a JSON file") from error
    answer = credit_file(_json_object(str(file), text))
    if as_json:
        print_json(answer)
        return
    print_table(answer["red_temperatures"], "RED temperatures")
    print_table(answer["episodes"], "episodes")


@app.command()
def ledger(run: RunFolder, as_json: AsJson = False) -> None:
    """Account for every generated segment and token: trained, dropped, lost, in flight."""
    from cod_async.commands.output import print_answer
    from cod_async.store.ledger import ledger as read_ledger

    with _database_as_input():
        answer = read_ledger(_run_folder(run))
    print_answer(answer, as_json, f"ledger of {run}")


@app.command()
def inspect(
    run: RunFolder,
    segment: Annotated[
        str | None, typer.Option(metavar="ID", help="One segment, like g000012.m03.o02.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look into the run database: lifecycles, segments, versions, lags."""
    from cod_async.commands.output import print_answer
    from cod_async.store.inspect import inspect_run

    with _database_as_input():
        answer = inspect_run(_run_folder(run), segment)
    print_answer(answer, as_json, f"{run}")


@app.command()
def plot(run: RunFolder, as_json: AsJson = False) -> None:
    """Draw the plots of a run again, into RUN/plots."""
    from cod_async.commands.output import print_json
    from cod_async.observe.plots import draw_all

    paths = [str(path) for path in draw_all(_run_folder(run))]
    if as_json:
        print_json({"plots": paths})
    else:
        typer.echo("\n".join(paths))


@app.command()
def replay(
    run: RunFolder,
    step: Annotated[int | None, typer.Option(help="Number of the step; steps count from 0.")] = None,
    lineage: Annotated[
        int | None, typer.Option(help="Lineage of a step that was rolled back; default the surviving one.")
    ] = None,
    failed: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A batch of RUN/failed_steps, instead of a step.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; default as the run says.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the step's per-token records (safetensors).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute a recorded step again and compare loss, gradients and every metric, bit for bit."""
    from cod_async.commands.replaying import run_replay

    with _database_as_input():
        code = run_replay(
            _run_folder(run),
            step=step,
            lineage=lineage,
            failed=failed,
            device=device,
            out=out,
            is_json=as_json,
        )
    raise typer.Exit(code)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Hugging Face model directory to make.")],
    step: Annotated[int | None, typer.Option(help="Optimiser step; default the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained version as a Hugging Face model directory."""
    from cod_async.commands.output import print_json
    from cod_async.config.check import check_new_folder
    from cod_async.launch.export import export_model

    problems = [*_run_folder_problems(run), *check_new_folder("OUT", out)]
    if problems:
        raise InputError(problems)
    version = export_model(run, out, step)
    if as_json:
        print_json({"path": str(out), "version": {"lineage": version.lineage, "step": version.step}})
    else:
        typer.echo(f"{out}: version {version}")


@app.command()
def coordinator(run: RunFolder) -> None:
    """Run the coordinator of a run (the launcher does this)."""
    from cod_async.coordinator.service import run_coordinator

    raise typer.Exit(run_coordinator(_run_folder(run)))


@app.command()
def actor(run: RunFolder, name: Annotated[str, typer.Option(help="Unique name of this actor.")]) -> None:
    """Run one actor of a run (the launcher does this; more may be started by hand)."""
    from cod_async.actor.worker import run_actor

    raise typer.Exit(run_actor(_run_folder(run), name))


@app.command()
def engine(run: RunFolder, name: Annotated[str, typer.Option(help="Name of the server, engine-N.")]) -> None:
    """Host one SGLang server of a run (the launcher does this)."""
    from cod_async.launch.engine_host import run_engine

    raise typer.Exit(run_engine(_run_folder(run), name))


@app.command()
def weights(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder to serve.")] = None,
    upstream: Annotated[
        str | None, typer.Option("--from", metavar="ADDRESS", help="Relay the server at this address.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the relay's files, its own.")] = None,
    bind: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Listen here; default weights.serve, or loopback.")
    ] = None,
    keep: Annotated[int, typer.Option(help="Versions that a relay keeps.")] = 2,
    server_key: Annotated[Path | None, typer.Option(help="Secret key file of this server.")] = None,
    authorized_keys: Annotated[Path | None, typer.Option(help="Folder of its clients' public keys.")] = None,
    client_key: Annotated[Path | None, typer.Option(help="Secret key file towards --from.")] = None,
    from_key: Annotated[Path | None, typer.Option(help="Public key file of the server at --from.")] = None,
) -> None:
    """Serve a run's published weights to actors that share no disk, or relay such a server."""
    from cod_async.commands.serving import ServingRequest, run_weights

    request = ServingRequest(
        run=None if run is None else _run_folder(run),
        upstream=upstream,
        cache=cache,
        bind=bind,
        keep_versions=keep,
        server_key=server_key,
        authorized_keys=authorized_keys,
        client_key=client_key,
        upstream_key=from_key,
    )
    raise typer.Exit(run_weights(request))


@app.command()
def learner(
    run: RunFolder,
    rank: Annotated[
        int | None, typer.Option(help="Be this one of several ranks; default: start all of them.")
    ] = None,
) -> None:
    """Run the learner of a run (the launcher does this)."""
    from cod_async.launch.ranks import has_ranks, run_ranks
    from cod_async.launch.supervisor import ENDED_RUN_CODE

    folder = _run_folder(run)
    if rank is None and has_ranks(folder):
        raise typer.Exit(run_ranks(folder))
    from cod_async.learner.loop import run_learner

    try:
        code = run_learner(folder, rank or 0)
    except NumericsError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = ENDED_RUN_CODE
    raise typer.Exit(code)


def _run_folder(run: Path) -> Path:
    """Return ``run`` if it is a run folder.

    Raises:
        InputError: it is not.
    """
    problems = _run_folder_problems(run)
    if problems:
        raise InputError(problems)
    return run


def _run_folder_problems(run: Path) -> list[str]:
    if (run / "config.json").is_file():
        return []
    return [f"{run}: no config.json in it; give the folder of a run that was started"]


@contextmanager
def _database_as_input() -> Iterator[None]:
    """A command that only reads a run database was given the wrong folder if it cannot be read."""
    try:
        yield
    except StoreError as error:
        raise InputError(str(error)) from error


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid JSON, {error}; correct it") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected a JSON object, found {type(value).__name__}; write it in braces")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``cod`` and return its exit code.

    Args:
        arguments: command line without the program's name; None takes ``sys.argv``.
    """
    from cod_async.launch.parent import follow_parent

    follow_parent()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="cod")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except InputError as error:
        for problem in error.problems:
            sys.stderr.write(f"{problem}\n")
        return 2
    except CodError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
