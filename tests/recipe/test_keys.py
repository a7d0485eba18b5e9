"""keys.py, arguments.py, schema.py: what every key of a recipe takes, as committed and as it is worded."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest
import yaml
from transformers import HfArgumentParser

from helpers.paths import ROOT
from llava_orpo import keys, schema
from llava_orpo.arguments import PLUGIN_KEYS, PluginArguments, refuse_unknown_keys
from llava_orpo.errors import UserError

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_committed_schema_and_page_are_what_the_dataclasses_say():
    assert (ROOT / "recipes" / "schema.json").read_text(encoding="utf-8") == schema.text()
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == schema.keys_page()


def test_schema_is_a_json_schema_with_every_plugin_key():
    jsonschema.Draft202012Validator.check_schema(json.loads(keys.place().read_text()))
    for name in PLUGIN_KEYS:
        assert keys.known()[name]["$comment"] == "PluginArguments" and keys.known()[name]["description"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_names_the_schema_and_fits_it(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    named = (path.parent / first.partition("$schema=")[2]).resolve()
    assert named == ROOT / "recipes" / "schema.json"
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(named.read_text()))


def test_schema_knows_what_the_annotations_leave_out():
    known = keys.known()
    assert known["eval_strategy"]["enum"] == ["no", "steps", "epoch"]
    assert {"llava_v16_mistral", "llava_next_mistral", None} < set(known["template"]["enum"])
    assert "array" in known["dataset"]["type"] and "array" not in known["adapter_name_or_path"]["type"]
    assert "boolean" in known["resume_from_checkpoint"]["type"]
    assert "$defs" not in json.dumps(known)


@pytest.mark.parametrize(
    "key, value, meant",
    [
        ("eval_strategy", False, "no"),
        ("save_strategy", False, "no"),
        ("logging_strategy", False, "no"),
        ("eval_strategy", True, True),  # no choice is called yes or on
        ("bf16", False, False),
        ("shared_prefix", "no", False),
        ("shared_prefix", "TRUE", True),
        ("shared_prefix", "flase", "flase"),
        ("anyres_max_tiles", "2", 2),
        ("lora_rank", 16.0, 16),
        ("lora_rank", 16.5, 16.5),
        ("lora_rank", "16.5", 16.5),
        ("learning_rate", "5e-6", 5e-6),
        ("learning_rate", "nan", "nan"),
        ("run_name", 7, "7"),
        ("run_name", False, False),
        ("master_port", 29500, "29500"),
        ("dataset_filter", "{}", "{}"),
        ("resume_from_checkpoint", True, True),
        ("recompute", "12", 12),
        ("recompute", "all", "all"),
    ],
)
def test_values_are_taken_as_they_are_meant(key, value, meant):
    found = keys.as_meant(value, keys.known()[key])
    assert found == meant and type(found) is type(meant)


WRONG = [
    ("grounding_eval", "flase", "grounding_eval: 'flase' is not allowed; it must be true or false."),
    ("grounding_eval", 1, "grounding_eval: 1 is not allowed; it must be true or false."),
    ("eval_examples", "many", "eval_examples: 'many' is not allowed; it must be a whole number, 0 or more."),
    ("eval_examples", True, "eval_examples: true is not allowed; it must be a whole number, 0 or more."),
    ("max_pairs_per_image", 2.5, "max_pairs_per_image: 2.5 is not allowed; it must be a whole number, 1 or more."),
    ("eval_min_subset", -3, "eval_min_subset: -3 is not allowed; it must be a whole number, 1 or more."),
    ("anyres_max_tiles", 0, "anyres_max_tiles: 0 is not allowed; it must be a whole number, 1 or more, or null."),
    ("heldout_fraction", 1.5, "heldout_fraction: 1.5 is not allowed; it must be a number, more than 0, less than 1."),
    ("verify_images", False, "verify_images: false is not allowed; it must be header or full."),
    (
        "attention_backend",
        "flx",
        "attention_backend: 'flx' is not allowed; did you mean `attention_backend: flex`? "
        "It must be auto, sdpa or flex.",
    ),
    ("recompute", -1, "recompute: -1 is not allowed; it must be auto, all or none, or a whole number, 0 or more."),
    ("recompute", True, "recompute: true is not allowed; it must be auto, all or none, or a whole number, 0 or more."),
    ("recompute", "al", "recompute: 'al' is not allowed; did you mean `recompute: all`? It must be auto, all or none,"),
    ("plugins", "lava_orpo", "did you mean `plugins: llava_orpo`?"),
    ("dataset_filter", "not json", "dataset_filter: 'not json' is neither a YAML mapping nor JSON"),
    ("dataset_filter", "[1]", "dataset_filter must map columns to values"),
    ("shared_prefx", True, "Unknown key `shared_prefx` (did you mean `shared_prefix`?)."),
]


@pytest.mark.parametrize("key, value, line", WRONG)
def test_a_wrong_value_is_refused_in_one_line(key, value, line):
    with pytest.raises(UserError) as refused:
        PluginArguments(**{key: value})
    assert line in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("key, value, line", [case for case in WRONG if case[0] in {*PLUGIN_KEYS} - {"dataset_filter"}])
def test_schema_and_dataclass_refuse_with_the_same_words(key, value, line):
    assert line in keys.problem(key, value, keys.known()[key])


def test_every_wrong_key_has_its_line():
    with pytest.raises(UserError) as refused:
        PluginArguments(eval_examples="many", heldout_fraction=2, shared_prefix=True)
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["heldout_fraction", "eval_examples"]


@pytest.mark.parametrize("value", [12, "12", 0, "auto", "all", "none"])
def test_recompute_takes_words_and_numbers(value):
    assert PluginArguments(recompute=value).recompute == str(value)
    (read,) = HfArgumentParser(PluginArguments).parse_args_into_dataclasses(["--recompute", str(value)])
    assert read.recompute == str(value)
    assert keys.problem("recompute", keys.as_meant(value, keys.known()["recompute"]), keys.known()["recompute"]) is None


def test_long_lists_of_choices_are_not_printed():
    line = keys.problem("template", "llava_v16_mistrl", keys.known()["template"])
    assert line == "template: 'llava_v16_mistrl' is not allowed; did you mean `template: llava_v16_mistral`?"


def test_unknown_keys_are_refused_together():
    with pytest.raises(UserError) as refused:
        refuse_unknown_keys(["learning_rat", "zzz", "seed"], {"learning_rate", "seed"})
    assert refused.value.args == ("Unknown key `learning_rat` (did you mean `learning_rate`?).", "Unknown key `zzz`.")


def test_plain_command_line_reads_the_same_class():
    line = "--plugins llava_orpo --shared_prefix false --anyres_max_tiles 3 --heldout_fraction 0.1 --verify_images full"
    words = [*line.split(), "--dataset_filter", '{"a": 1}']
    (read,) = HfArgumentParser(PluginArguments).parse_args_into_dataclasses(words)
    assert read == PluginArguments(
        shared_prefix=False, anyres_max_tiles=3, heldout_fraction=0.1, verify_images="full", dataset_filter={"a": 1}
    )
    with pytest.raises(UserError, match="max_pairs_per_image: 0 is not allowed"):
        HfArgumentParser(PluginArguments).parse_args_into_dataclasses(["--max_pairs_per_image", "0"])


PURE = ["", ".accelerator", ".arguments", ".errors", ".keys", ".precheck", ".recipe", ".schema"]


@pytest.mark.parametrize("module", PURE)
def test_importing_a_pure_module_has_no_side_effect(module):
    code = (
        "import os, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'llava_orpo' not in type(f).__module__]\n"
        "for name in [n for n in sys.modules if n.startswith('llava_orpo')]: del sys.modules[name]\n"
        "finders, environment = list(sys.meta_path), dict(os.environ)\n"
        f"import llava_orpo{module}\n"
        "assert sys.meta_path == finders and dict(os.environ) == environment\n"
        "heavy = {'torch', 'transformers', 'llamafactory', 'omegaconf', 'jsonschema'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
