"""dvc.yaml, the scripts and the package say the same thing."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from conftest import REPOSITORY, RunPython, with_changes

import sharebasis
from sharebasis.config.structures import STRUCTURES

STAGES = (
    "extract",
    "classify",
    "calibrate",
    "decompose",
    "sensitivity",
    "fit",
    "propagate",
    "recover",
    "verify",
    "curve",
    "vary",
    "attribute",
    "report",
)


# dvc.yaml


@pytest.fixture(scope="module")
def pipeline() -> Mapping[str, Any]:
    """The stages of dvc.yaml."""
    return yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Who imports whom, inside the package; structures are imported by what settings call them."""
    built = grimp.build_graph("sharebasis", exclude_type_checking_imports=True, cache_dir=None)
    for entry in STRUCTURES.values():
        module = entry.implementation.partition(":")[0]
        built.add_import(importer="sharebasis.structures.table", imported=module)
    return built


def imported(script: Path, graph: grimp.ImportGraph) -> set[str]:
    """The modules of the package that a script names in its imports."""
    modules = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in graph.modules:
                name = name.rpartition(".")[0]
            modules |= {name} if name else set()
    return modules


def room(module: str) -> str:
    """The folder (of `stages`, that of the stage) or the file at the top that a module lies in."""
    _, *steps = module.split(".")
    path = "/".join(["src/sharebasis", *steps[: 2 if steps[0] == "stages" else 1]])
    return path if (REPOSITORY / path).is_dir() else f"{path}.py"


def modules_of(script: Path, graph: grimp.ImportGraph) -> set[str]:
    """Every module of the package that a script runs."""
    direct = imported(script, graph)
    modules = direct.union(*(graph.find_upstream_modules(module) for module in direct))
    # To import a module is to run the packages it lies in.
    packages = {".".join(name.split(".")[:n]) for name in modules for n in (1, 2, 3)}
    return (modules | packages) & graph.modules


def rooms(script: Path, graph: grimp.ImportGraph) -> set[str]:
    """Where the code lies that a script runs, itself included."""
    modules = modules_of(script, graph) - {"sharebasis", "sharebasis.stages"}
    return {room(module) for module in modules} | {str(script.relative_to(REPOSITORY))}


def code_of(stage: Mapping[str, Any]) -> set[str]:
    """What a stage says of the code that it depends on."""
    return {dep for dep in stage["deps"] if dep.startswith(("src/", "stages/"))}


def wrong_code(stage: Mapping[str, Any], script: Path, graph: grimp.ImportGraph) -> set[str]:
    """Code that a stage depends on without saying so, or says without depending on it."""
    return code_of(stage) ^ rooms(script, graph)


@pytest.mark.parametrize("name", STAGES)
def test_the_code_that_a_stage_depends_on_is_what_its_script_imports(
    pipeline: Mapping[str, Any], graph: grimp.ImportGraph, name: str
) -> None:
    script = REPOSITORY / "stages" / f"{name}.py"
    assert wrong_code(pipeline[name], script, graph) == set()
    assert pipeline[name]["cmd"] == f"python stages/{name}.py"


def test_every_stage_has_a_script_and_the_other_way_round(pipeline: Mapping[str, Any]) -> None:
    assert tuple(pipeline) == STAGES
    assert {path.stem for path in (REPOSITORY / "stages").glob("*.py")} == set(STAGES)


COMMANDS = {"sharebasis.align", "sharebasis.collect", "sharebasis.params", "sharebasis.summary"}
"""Modules for people to run."""


def test_every_module_belongs_to_a_stage_or_is_for_people_to_use(graph: grimp.ImportGraph) -> None:
    used = set().union(
        *(modules_of(REPOSITORY / "stages" / f"{name}.py", graph) for name in STAGES)
    )
    sweep = {name for name in graph.modules if name.startswith("sharebasis.sweep")}
    at_the_front = {f"sharebasis.{home}" for home in sharebasis._HOMES.values()}
    for_people = (COMMANDS | at_the_front) & graph.modules
    of_commands = for_people.union(*map(graph.find_upstream_modules, for_people))
    assert graph.modules - used - sweep - {"sharebasis"} <= of_commands
    assert not used & sweep  # or a change to how runs are made would make all of them run again


def test_parameters_of_a_stage_exist(
    pipeline: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    for name, stage in pipeline.items():
        for key in stage.get("params", ()):
            section: Any = params
            for step in key.split("."):
                assert step in section, f"{name}: {key}"
                section = section[step]


def test_every_parameter_makes_some_stage_run_again_or_cannot_change_a_result(
    pipeline: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    listed = {key for stage in pipeline.values() for key in stage.get("params", ())}
    leaves = {
        f"{section}.{key}" if isinstance(content, Mapping) else section
        for section, content in params.items()
        for key in (content if isinstance(content, Mapping) else [None])
    }
    covered = {key for key in leaves if key in listed or key.split(".")[0] in listed}
    assert leaves - covered == {
        "model.tracked",  # a dependency itself
        "calibrate.checkpoint_seconds",  # how often, not what
    }


# Imports


TOLD = r"(start_computing\(settings|use_onednn\(settings\.onednn)\)"


def test_every_stage_that_multiplies_asks_by_what(
    pipeline: Mapping[str, Any], graph: grimp.ImportGraph
) -> None:
    scripts = {name: REPOSITORY / "stages" / f"{name}.py" for name in STAGES}
    kernels = "sharebasis.runtime.matmul"
    multiply = {name for name in STAGES if kernels in modules_of(scripts[name], graph)}
    multiply -= {"classify"}  # on the meta device, where there are no numbers
    asked = {name for name, stage in pipeline.items() if "onednn" in stage.get("params", ())}
    told = {name for name in STAGES if re.search(TOLD, scripts[name].read_text())}
    assert multiply == asked == told


@pytest.mark.parametrize("module", ["sharebasis", "sharebasis.errors", "sharebasis.config.schema"])
def test_a_light_module_imports_no_framework(run_python: RunPython, module: str) -> None:
    run = run_python(
        """
        import importlib, sys
        importlib.import_module(sys.argv[1])
        heavy = {"torch", "transformers", "hydra", "omegaconf", "datasets", "pydantic"}
        print(sorted(heavy & set(sys.modules)))
        """,
        module,
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("stage", ["sensitivity", "propagate", "recover"])
def test_a_stage_that_is_left_out_loads_no_framework(
    run_python: RunPython, params: Mapping[str, Any], tmp_path: Path, stage: str
) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(dict(params)))
    run = run_python(
        """
        import runpy, sys
        runpy.run_path(sys.argv.pop(1), run_name="__main__")
        print(sorted({"torch", "transformers", "hydra", "omegaconf"} & set(sys.modules)))
        """,
        REPOSITORY / "stages" / f"{stage}.py",
        cwd=tmp_path,
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
    (out,) = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"][stage]["outs"]
    assert (tmp_path / next(iter(out))).exists()


def test_the_package_gives_load_compressed_on_demand_and_nothing_it_has_not() -> None:
    import sharebasis
    from sharebasis.compressed.loader import load_compressed

    assert sharebasis.load_compressed is load_compressed
    with pytest.raises(AttributeError, match="'sharebasis' has no attribute 'load_compresed'"):
        _ = sharebasis.load_compresed


# Scripts


# One process for all, as loading torch and transformers takes longer than the rest; the package
# itself is loaded by every script anew, in a child of its own.
RUN_SCRIPTS = """
    import ast, importlib, json, os, runpy, sys
    from pathlib import Path
    import accelerate, hydra, pydantic, torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    assert not any(name.startswith("sharebasis") for name in sys.modules)
    results = {}
    scripts, arguments = map(Path, sys.argv[2:]), json.loads(sys.argv[1])
    for script, given in ((script, given) for script in scripts for given in arguments):
        name = f"{script.stem} {given}".strip()
        files = [Path(f"../{name}.{stream}") for stream in ("out", "err", "modules")]
        sys.argv[1:] = given.split()
        child = os.fork()
        if child == 0:
            for number, file in zip((1, 2), files):
                os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
            try:
                runpy.run_path(str(script), run_name="__main__")
            finally:
                # What it imports where it is needed, too.
                nodes = ast.walk(ast.parse(script.read_text()))
                imports = [one for one in nodes if isinstance(one, (ast.Import, ast.ImportFrom))]
                exec(compile(ast.Module(imports, []), script, "exec"))
                if "sharebasis.structures.table" in sys.modules:  # which imports by name
                    for entry in sys.modules["sharebasis.config.structures"].STRUCTURES.values():
                        importlib.import_module(entry.implementation.partition(":")[0])
                modules = [name for name in sys.modules if name.startswith("sharebasis.")]
                files[2].write_text(" ".join(modules))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        results[name] = [status, *(file.read_text() for file in files)]
    print(json.dumps(results))
"""


ARGUMENTS = ("--help", "--removed 0.3")


@dataclass(frozen=True)
class Ended:
    """How a script ended."""

    status: int
    out: str
    err: str
    modules: str
    """Of the package, that it had loaded by then."""


@pytest.fixture(scope="module")
def refusals(
    params: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory, run_python: RunPython
) -> Mapping[str, Ended]:
    """What every stage does with a wrong params.yaml, where there is no artefact at all, by its
    name and the arguments that it is given."""
    directory = tmp_path_factory.mktemp("parent") / "checkout"
    directory.mkdir()
    wrong = with_changes(params, {"fit.removed": 3})
    (directory / "params.yaml").write_text(yaml.safe_dump(wrong))
    scripts = [REPOSITORY / "stages" / f"{stage}.py" for stage in STAGES]
    run = run_python(RUN_SCRIPTS, json.dumps(["", *ARGUMENTS]), *scripts, cwd=directory)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in directory.iterdir()] == ["params.yaml"]
    return {called: Ended(*result) for called, result in json.loads(run.stdout).items()}


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_a_stage_does_reads_and_writes_and_runs_nothing(
    refusals: Mapping[str, Ended], pipeline: Mapping[str, Any], stage: str
) -> None:
    ended = refusals[f"{stage} --help"]
    assert (ended.status, ended.err) == (0, "")
    docstring = ast.get_docstring(ast.parse((REPOSITORY / f"stages/{stage}.py").read_text()))
    assert f"\n{docstring}\n" in ended.out
    code = ("src/", "stages/", "requirements/pipeline.txt")
    parts = re.split(r"^(reads|parameters.*|writes|options):\n", ended.out, flags=re.MULTILINE)
    listed = dict(zip(parts[1::2], map(str.split, parts[2::2]), strict=True))
    entry = pipeline[stage]
    assert listed["reads"] == [dep for dep in entry["deps"] if not dep.startswith(code)]
    assert listed.get("parameters, in params.yaml", []) == entry.get("params", [])
    outs = [out for kind in ("outs", "metrics", "plots") for out in entry.get(kind, ())]
    assert listed["writes"] == [next(iter(out)) for out in outs]


@pytest.mark.parametrize("stage", STAGES)
def test_an_argument_is_refused_with_one_line(refusals: Mapping[str, Ended], stage: str) -> None:
    ended = refusals[f"{stage} --removed 0.3"]
    assert (ended.status, ended.out) == (1, "")
    expected = f"stages/{stage}.py takes no argument '--removed'; it goes by params.yaml."
    (line,) = ended.err.splitlines()
    assert line.startswith(expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_wrong_settings_ends_with_one_line_before_it_reads_anything(
    refusals: Mapping[str, Ended], stage: str
) -> None:
    ended = refusals[stage]
    assert ended.status == 1
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("SettingsError: params.yaml is not valid: fit.removed: ")
    assert "it is 3" in line


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_script_loads_is_what_the_graph_says(
    refusals: Mapping[str, Ended], graph: grimp.ImportGraph, stage: str
) -> None:
    script = REPOSITORY / "stages" / f"{stage}.py"
    loaded = set(refusals[stage].modules.split())
    assert loaded == modules_of(script, graph) - {"sharebasis"}
