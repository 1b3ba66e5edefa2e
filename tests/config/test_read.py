"""Pins of the configuration.

- Every error is one line that names the file or override, the key and a remedy; whatever the bytes of the file,
  nothing but `ConfigError` comes out.
- What `to_yaml` writes, `load_config` reads back to an equal configuration.
- YAML is bounded: size, depth, values (aliases counted as what they stand for), no repeated keys, no Python
  objects.
- Overrides win over the file, the file over its base, the last base over the defaults; `1e-4` is a float.
- A base that is missing or leads back is an error of the file that names it.
- What is given to a comparison for its recipes reaches them as it is typed.
- Every key is documented and its default is legal; the recipes that ship load.
"""

import dataclasses
import importlib.metadata
import re
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmfg_dgl.config import (
    Config,
    DataConfig,
    FeaturesConfig,
    RelationConfig,
    describe_keys,
    load_bench,
    load_config,
    recipe_files,
    recipes,
    to_yaml,
)
from cmfg_dgl.config import read as module
from cmfg_dgl.config.text import resolve_paths
from cmfg_dgl.errors import ConfigError

SECTIONS = {f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)}


@pytest.fixture
def installed():
    """The recipes lie beside the package, and only an installed one finds them."""
    try:
        importlib.metadata.distribution("cmfg-dgl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")


@pytest.fixture
def no_recipes(monkeypatch):
    monkeypatch.setattr(module, "recipes", dict)


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def error_of(source, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


ERRORS = {
    "unknown key": ("model: {widht: 3}", ["model.widht", "did you mean model.width?"]),
    "key of earlier versions": (
        "model: {sharpness: 4.0}",
        ["model.sharpness", "it is retrieval.inverse_temperature"],
    ),
    "another one": ("model: {bank: 0}", ["model.bank", "retrieval.query_bank", "retrieval.correction: none"]),
    "unknown section": ("modle: {width: 3}", ["modle", "did you mean model?"]),
    "unlike any key": ("model: {zzzzzz: 3}", ["model.zzzzzz", "known here: width, heads"]),
    "key of a relation": (
        "graph: {relations: {spatial: {radus: 3}}}",
        ["relations.spatial.radus", "radius?"],
    ),
    "key of a new relation": (
        "graph: {relations: {mine: {surce: patch}}}",
        ["relations.mine.surce", "source?"],
    ),
    "relation misspelt": (
        "graph: {relations: {spacial: {radius: 3}}}",
        ["relations.spacial", "mean spatial?"],
    ),
    "not a number": ("model: {width: broad}", ["model.width", "'broad'"]),
    "part of an integer": ("model: {width: 2.5}", ["model.width", "2.5"]),
    "too small": ("model: {width: 0}", ["model.width", "least is 1"]),
    "too large": ("model: {dropout: 0.99}", ["model.dropout", "most is 0.95"]),
    "infinite": ("training: {learning_rate: .inf}", ["training.learning_rate", "finite"]),
    "not a number at all": ("training: {learning_rate: .nan}", ["training.learning_rate", "finite"]),
    "choice": ("model: {softmax: jont}", ["model.softmax", "'jont'", "relation, joint", "did you mean joint?"]),
    "start without residual": ("model: {residual: false}", ["model.init", "model.residual", "random"]),
    "boolean": ("model: {residual: maybe}", ["model.residual", "maybe"]),
    "nothing": ("data: {seed: null}", ["data.seed"]),
    "number for a section": ("data: 5", ["data", "keys of its own"]),
    "word for a relation": ("graph: {relations: {spatial: grid}}", ["graph.relations.spatial", "keys of its own"]),
    "heads": ("model: {width: 256, heads: 3}", ["model.width 256", "model.heads 3"]),
    "cross layers": ("model: {layers: 2, cross_layers: 3}", ["model.cross_layers 3", "model.layers 2"]),
    "grid of tokens": (
        "graph: {relations: {context: {topology: grid}}}",
        ["relations.context", "token to token"],
    ),
    "window of patches": (
        "graph: {relations: {spatial: {topology: window}}}",
        ["spatial.topology window"],
    ),
    "knn across": ("graph: {relations: {grounds: {topology: knn}}}", ["relations.grounds.topology knn"]),
    "topk within": ("graph: {relations: {spatial: {topology: topk}}}", ["relations.spatial.topology topk"]),
    "directed across": (
        "graph: {relations: {grounds: {directed: true}}}",
        ["relations.grounds.directed", "one type"],
    ),
    "relation name": (
        "graph: {relations: {a.b: {source: patch, target: patch}}}",
        ["relations.a.b", "rename"],
    ),
    "fractions": ("data: {fractions: {train: 0.5}}", ["data.fractions", "sum to 1"]),
    "fraction of nothing": ("data: {fractions: {train: 0.7, val: 0.3, test: 0.0}}", ["data.fractions", "positive"]),
    "fraction NaN": ("data: {fractions: {train: .nan}}", ["data.fractions"]),
    "interpolation": ("run: {output_dir: '${nowhere}'}", ["run.output_dir", "nowhere"]),
    "endless interpolation": ("data: {root: '${data.root}'}", ["data.root"]),
    "repeated key": ("data: {seed: 1}\ndata: {seed: 2}", ["'data'", "twice", "line 2"]),
    "repeated key within": ("data:\n  seed: 1\n  name: a\n  seed: 2", ["'seed'", "twice", "line 4"]),
    "list": ("- data", ["must hold keys", "list"]),
    "word": ("data", ["must hold keys", "str"]),
    "unclosed": ("data: {seed: 1", ["not valid YAML", "line 1"]),
    "python": ("data: !!python/object/apply:os.getcwd []", ["not valid YAML", "python/object"]),
    "list as key": ("? [a]\n: 1", ["not valid YAML", "unhashable"]),
    "number as key": ("1: 2", ["'1'"]),
    "huge number": ("data: {seed: " + "9" * 5000 + "}", ["digits"]),
    "huge float": ("training: {learning_rate: " + "9" * 400 + "}", ["too large"]),
    "bad date": ("data: {root: 2020-13-45}", ["not valid YAML", "month"]),
    "not UTF-8": (b"data: {root: \xff}", ["cannot be read", "UTF-8"]),
    "control character": (b"data: {root: \x01}", ["not valid YAML"]),
    "too long": ("#" * (module.MAX_YAML_BYTES + 1), ["larger than", "bytes"]),
    "deep": ("data: {root: " + "[" * 5000 + "]" * 5000 + "}", ["deep"]),
    "alias of itself": ("data: &a\n  root: *a", ["alias"]),
    "alias bomb": (
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 6)),
        ["values"],
    ),
    "flood": ("data: {root: [" + "x," * module.MAX_YAML_VALUES + "]}", ["values"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_a_file_name_file_key_and_remedy(name, written):
    text, words = ERRORS[name]
    path = written(text)
    message = error_of(path)
    assert message.startswith(path)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", ["model.widht", "did you mean model.width?"]),
        ("model.width", ["key.path=value"]),
        ("=3", ["key.path=value"]),
        ("data..seed=3", ["key.path=value"]),
        ("model.width=broad", ["model.width", "'broad'"]),
        ("model.width=[", ["not valid YAML"]),
        ("model.kernel=blok", ["model.kernel", "did you mean block?"]),
        ("model=3", ["model", "keys of its own"]),
        ("training.distillation=1", ["training.distillation", "set training.joint_pairs to all"]),
        ("model.matching_head=reasoning", ["model.matching_head", "set training.joint_pairs to all"]),
        ("data.seed=-1", ["data.seed", "least is 0"]),
        ("run.output_dir=", ["run.output_dir", "empty"]),
        ("data.fractions=" + "[" * 5000, ["deep"]),
    ],
)
def test_errors_of_an_override_name_it(override, words):
    message = error_of(None, [override])
    assert override in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("features.vision=pyramid", ["features.vision pyramid", "leave features.aligned out", "hybrid"]),
        ("features.text=bert", ["features.text bert", "leave features.aligned out", "minilm"]),
        ("features.compile=true", ["features.compile", "leave it out"]),
        ("features.layer=3", ["features.layer", "leave it out"]),
        ("features.views=[mirror]", ["features.views", "leave it out"]),
        ("features.text_layers=[0,6]", ["features.text_layers", "leave it out"]),
        ("features.precision=bf16", ["features.precision", "leave it out"]),
        ("training.tune.text=all", ["training.tune.text", "leave it out"]),
        ("training.tune.vision=1", ["training.tune.vision", "leave it out"]),
    ],
)
def test_an_aligned_model_is_the_only_encoder(override, words):
    assert load_config(None, ["features.aligned=a/b"]).features.aligned == "a/b"
    message = error_of(None, ["features.aligned=a/b", override])
    for word in ("features.aligned=a/b", *words):
        assert word in message


YAML_TOKENS = st.sampled_from(
    ["data", "model", "base", "graph", "relations", "width", "spatial", "seed", "root", ": ", ":\n  ", "\n", "{",
     "}", "[", "]", ", ", "- ", "&a ", "*a", "!!int ", "!!set ", "!!binary ", "? ", "'", '"', "1", "1e-4", "~",
     "<<", "${", "???", "2020-01-01", "|", "\t", "\x00", "é", "#"]
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@example(text="~\x00")
@given(text=st.lists(YAML_TOKENS, max_size=12).map("".join) | st.text(max_size=30))
def test_no_file_and_no_override_raises_anything_else(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    for source, overrides in ((str(path), []), (None, [text]), (None, [f"data.root={text}"])):
        try:
            load_config(source, overrides)
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", ".0001"])
def test_numbers_are_floats_however_they_are_written(text, written):
    path = written(f"training: {{learning_rate: {text}}}")
    for config in (load_config(None, [f"training.learning_rate={text}"]), load_config(path)):
        assert config.training.learning_rate == 1e-4
        assert type(config.training.learning_rate) is float
    assert load_config(None, [f"retrieval.alpha={text}"]).retrieval.alpha == 1e-4
    assert type(load_config(None, ["training.clip=2"]).training.clip) is float


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(written):
    path = written("\ufeffmodel: {width: 64, heads: 2}\ntraining: {epochs: 3}\n")
    config = load_config(path, ["model.width=32", "model.width=16", "data.root=a=b # c", "features.dir="])
    expected = resolve_paths(Config())
    expected.model.width, expected.model.heads, expected.training.epochs, expected.data.root = 16, 2, 3, "a=b # c"
    assert config == expected


@pytest.mark.parametrize("text", ["", "# nothing\n", "data: {}"])
def test_an_empty_file_is_the_defaults(text, written):
    assert load_config(written(text)) == resolve_paths(Config()) == load_config(None)


BASES = {
    "low": (
        "model: {width: 64, heads: 2}\ntraining: {epochs: 3, clip: 2.0}\ngraph: {relations: {spatial: {radius: 3}}}"
    ),
    "middle": "base: low.yaml\ntraining: {epochs: 4}\ngraph: {relations: {mine: {source: token, target: token}}}",
    "high": "base: ../low/middle.yaml\nmodel: {width: 32}\ngraph: {relations: {spatial: {size: 7}}}",
}


def write_bases(folder):
    """`high` on `middle` on `low`, each but the first beside its base."""
    for name, text in BASES.items():
        path = folder / ("high" if name == "high" else "low") / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "high" / "high.yaml"


def test_a_recipe_says_what_it_changes_of_its_base(tmp_path):
    path = write_bases(tmp_path)
    config = load_config(str(path), ["training.clip=3.0"])
    expected = resolve_paths(Config())
    expected.model.width, expected.model.heads = 32, 2
    expected.training.epochs, expected.training.clip = 4, 3.0
    expected.graph.relations["spatial"].radius, expected.graph.relations["spatial"].size = 3, 7
    expected.graph.relations["mine"] = RelationConfig("token", "token")
    assert config == expected
    assert [file.stem for file in recipe_files(str(path))] == ["low", "middle", "high"]
    assert recipe_files(None) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=3", "model.width=192"], ["model.heads 3", "set it to 1, 2, 4 or 8"]),
        (["model.cross_layers=0"], ["training.distillation", "set it to 0"]),
        (
            ["graph.relations.grounds.topology=none", "graph.relations.describes.topology=none"],
            ["training.distillation", "cross-modal relation"],
        ),
    ],
)
def test_a_matching_head_with_nothing_to_compare_is_refused(overrides, words):
    with pytest.raises(ConfigError) as raised:
        load_config("photographs", overrides)
    assert all(word in str(raised.value) for word in words)


def test_seeds_for_all_methods_take_the_place_of_their_own():
    assert load_bench("flickr8k-frozen").seeds_of["scan"] == [0, 1, 2]
    assert load_bench("flickr8k-frozen", ["seeds=[3]"]).seeds_of == {}
    both = load_bench("flickr8k-frozen", ["seeds=[3]", "seeds_of={scan: [3, 4]}", "methods=[cca, scan]"])
    assert (both.seeds, both.seeds_of["scan"]) == ([3], [3, 4])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seeds_of={cca: []}"], ["seeds_of.cca", "give at least one"]),
        (["seeds_of={cca: [1, 1]}"], ["seeds_of.cca", "none twice"]),
        (["seeds_of={cca: [-1]}"], ["seeds_of.cca", "the least is 0"]),
        (["seeds=[0]", "seeds_of={cca: [1]}"], ["cca has the seeds [1], and cmfg [0]"]),
    ],
)
def test_seeds_that_cannot_be_compared_are_refused(overrides, words):
    with pytest.raises(ConfigError) as raised:
        load_bench("smoke", ["methods=[cmfg, cca]", *overrides])
    assert all(word in str(raised.value) for word in words)
    # Without cmfg there is nothing to compare with.
    if "and cmfg" in words[0]:
        load_bench("smoke", ["methods=[cca]", *overrides])


def test_a_shipped_recipe_may_be_a_base(installed, written):
    config, base = load_config(written("base: photographs\ndata: {name: folder}")), load_config("photographs")
    base.data.name = "folder"
    assert config == base
    bench = load_bench(written("base: smoke\nseeds: [5]"))
    assert bench == dataclasses.replace(load_bench("smoke"), seeds=[5])


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("photograph", ["photograph: no such file", "did you mean photographs?"]),
        ("low/none.yaml", ["low/none.yaml: no such file", "give a YAML file"]),
        ("[photographs]", ["['photographs'] is no text", "name one recipe"]),
        ("5", ["5 is no text"]),
        ("~nobody-of-that-name/x.yaml", ["nobody-of-that-name/x.yaml: no such file"]),
        ("recipe.yaml", ["recipe.yaml -> ", "is a circle"]),
        ("./back.yaml", ["recipe.yaml -> ", "back.yaml -> ", "is a circle"]),
    ],
)
def test_a_base_that_is_none_is_named(installed, written, tmp_path, base, words):
    (tmp_path / "back.yaml").write_text("base: recipe.yaml")
    path = written(f"base: {base}\ndata: {{seed: 1}}")
    message = error_of(path)
    assert ": base: " in message
    for word in (str(tmp_path), *words):
        assert word in message


def test_errors_of_a_base_name_its_file(tmp_path):
    path = write_bases(tmp_path)
    (tmp_path / "low" / "low.yaml").write_text("model: {widht: 3}")
    message = error_of(str(path))
    assert message.startswith(str(tmp_path / "high" / ".." / "low" / "low.yaml"))
    assert "did you mean model.width?" in message


def test_an_override_of_a_comparison_with_a_section_is_for_its_recipes(written):
    path = written(
        "recipes: [folder]\noverrides: [data.root=a, training.epochs=1]\nsettings: {cca: [{ridge: 3.0}]}"
    )
    given = ["data.root=${b} # c", "minutes=7", "training.epochs=[2", "settings.vsepp=[{epochs: 3}]"]
    bench = load_bench(path, given)
    assert bench.overrides == ["data.root=a", "training.epochs=1", "data.root=${b} # c", "training.epochs=[2"]
    assert bench.minutes == 7
    assert bench.settings == {"cca": [{"ridge": 3.0}], "vsepp": [{"epochs": 3}]}
    assert load_bench(path, ["overrides=[run.seed=1]", "data.seed=2"]).overrides == ["run.seed=1", "data.seed=2"]


def test_modest_aliases_are_read(written):
    config = load_config(written("data: {seed: &s 5}\nrun: {seed: *s}"))
    assert config.data.seed == config.run.seed == 5


def test_relations_take_new_names_and_keep_what_is_not_said():
    config = load_config(
        None,
        [
            "graph.relations.mine={source: token, target: patch, topology: topk, k: 2}",
            "graph.relations.spatial.radius=3",
            "graph.relations.grounds.topology=none",
        ],
    )
    relations = config.graph.relations
    assert relations["mine"] == RelationConfig("token", "patch", "topk", k=2)
    assert relations["spatial"] == RelationConfig("patch", "patch", "grid", radius=3)
    assert relations["grounds"].topology == "none"
    assert list(relations)[:5] == list(Config().graph.relations)
    message = error_of(None, [f"graph.relations.{name}.topology=none" for name in Config().graph.relations])
    assert "graph.relations" in message
    assert "none" in message


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="$")).filter(lambda text: text != "???")
LEGAL = {
    ("patch", "patch"): ["complete", "grid", "knn", "none"],
    ("token", "token"): ["complete", "window", "knn", "none"],
    ("patch", "token"): ["complete", "topk", "none"],
    ("token", "patch"): ["complete", "topk", "none"],
}


def value_of(item, kind):
    """Legal values of one key, from its type and its bounds."""
    if type(None) in typing.get_args(kind):
        return st.none() | value_of(item, typing.get_args(kind)[0])
    if dataclasses.is_dataclass(kind):
        return section(kind)
    choices, least, most = (item.metadata[name] for name in ("choices", "least", "most"))
    if choices:
        return st.lists(st.sampled_from(choices)) if kind == list[str] else st.sampled_from(choices)
    if kind == list[int]:
        return st.lists(st.integers())
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(least, most if most is not None else 2**40)
    if kind is float:
        return st.floats(least, most, allow_nan=False, allow_infinity=False)
    return TEXT


def section(kind, **fixed):
    hints = typing.get_type_hints(kind)
    values = {f.name: value_of(f, hints[f.name]) for f in dataclasses.fields(kind) if f.name not in fixed}
    return st.builds(kind, **values, **fixed)


@st.composite
def relations(draw):
    made = {}
    names = draw(st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), max_size=3))
    for name in [*Config().graph.relations, *names]:
        known = Config().graph.relations.get(name)
        ends = (known.source, known.target) if known else draw(st.sampled_from(list(LEGAL)))
        topology = "complete" if name == "spatial" else draw(st.sampled_from(LEGAL[ends]))
        directed = draw(st.booleans()) if ends[0] == ends[1] else False
        numbers = {key: draw(st.integers(1, 99)) for key in ("radius", "k", "size")}
        made[name] = RelationConfig(*ends, topology, directed=directed, **numbers)
    return made


@st.composite
def configs(draw):
    config = Config(data=draw(section(DataConfig, fractions=st.just({}))))
    for name, kind in SECTIONS.items():
        if name not in ("data", "graph"):
            setattr(config, name, draw(section(kind)))
    config.graph.relations = draw(relations())
    config.run.output_dir = config.run.output_dir or "runs"
    config.features.aligned = config.features.aligned or None
    config.features.text_layers = draw(st.lists(st.integers(0, 24), max_size=4, unique=True))
    config.model.width = config.model.heads * draw(st.integers(1, 64))
    tune = config.training.tune
    tune.text = draw(st.sampled_from((None, "all", "1", "12")))
    if tune.vision is not None:
        config.features.views, config.features.image_project = [], None
    if config.features.aligned is not None:
        config.features = FeaturesConfig(aligned=config.features.aligned, max_tokens=config.features.max_tokens)
        tune.text = tune.vision = None
    if tune.text is None and tune.vision is None:
        tune.lora = None
    config.model.residual |= config.model.init == "cca"
    if config.model.matching_head == "reasoning" and 64 % config.model.heads:
        config.model.heads = 2
        config.model.width = 8
    if config.model.matching_head == "reasoning":
        config.training.joint_pairs, config.training.graphs = "all", "factorised"
    config.model.cross_layers = min(config.model.cross_layers, config.model.layers)
    crosses = any(r.topology != "none" and r.source != r.target for r in config.graph.relations.values())
    if not crosses or not config.model.cross_layers:
        config.training.distillation = 0.0
    if config.training.distillation:
        config.training.joint_pairs = "all"
        config.training.joint_weight = max(config.training.joint_weight, 0.5)
    shares = draw(st.tuples(*[st.integers(1, 1000)] * 3))
    config.data.fractions = {n: s / sum(shares) for n, s in zip(("train", "val", "test"), shares, strict=True)}
    return config


@settings(deadline=None, max_examples=30)
@given(config=configs())
def test_what_is_written_is_read_back(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == resolve_paths(config)


def keys(kind, prefix):
    for item in dataclasses.fields(kind):
        inner = typing.get_type_hints(kind)[item.name]
        if dataclasses.is_dataclass(inner):
            yield from keys(inner, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def test_every_key_is_documented_once_with_its_default():
    described = {key: (default, text) for key, default, text in describe_keys()}
    assert all(len(text) > 10 and "\n" not in text for _, text in described.values())
    expected = {f"graph.relations.NAME.{f.name}" for f in dataclasses.fields(RelationConfig)} | {"graph.relations"}
    for name, kind in SECTIONS.items():
        if name != "graph":
            expected |= set(keys(kind, f"{name}."))
    assert set(described) == expected
    assert described["training.learning_rate"][0] == "0.001"
    assert re.search(r"\(auto \| edge \| block \| dgl\)", described["model.kernel"][1])


def test_recipes_are_found_and_load(installed):
    assert "openmoji" in recipes()
    for name, path in recipes().items():
        assert load_config(name) == load_config(str(path))


def test_a_missing_file_names_the_recipes(installed):
    assert "openmoji" in error_of("no/such/file.yaml")
    assert "use -c openmoji" in error_of("somewhere/openmoji.yaml")


def test_a_missing_file_is_named(no_recipes, tmp_path):
    assert error_of(str(tmp_path)).startswith(str(tmp_path))
