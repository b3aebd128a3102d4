"""The files a plan is made from, looked at before they are given to transformers and llm-compressor.

Both take what they are given: a pipe is waited for, a billion layers are begun, and errors come in any class.
"""

from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig

from elsa_sparse.errors import printable
from elsa_sparse.files import read_bounded, read_json

__all__ = ["check_recipe_file", "config_of"]

_MAX_RECIPE_BYTES = 10**6
# Nodes of a recipe's YAML, each counted as often as it is referred to.
_MAX_RECIPE_NODES = 100_000
# Each is a module that is made: the deepest models have some 200 layers, the widest some 25,000 experts in all.
_MAX_LAYERS = 1_000
_MAX_EXPERTS = 100_000


def check_recipe_file(recipe: Path) -> None:
    """Refuse what is not a file of YAML of a sensible size.

    :raises ValueError: if it is no regular file, or too large, also after what it refers to is put in, or names a key
        twice
    """
    text = read_bounded(recipe, _MAX_RECIPE_BYTES).decode("utf-8")
    if recipe.suffix.lower() != ".md":
        sizes: dict[int, int] = {}
        if (root := yaml.compose(text, Loader=yaml.SafeLoader)) is not None:
            _size(root, sizes)


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes in a node."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("it refers to itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"the key {min(twice)!r} is there twice")
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_size(child, sizes) for child in children)
    if size > _MAX_RECIPE_NODES:
        raise ValueError(f"it holds more than {_MAX_RECIPE_NODES:,} values")
    sizes[id(node)] = size
    return size


def config_of(model: str) -> PreTrainedConfig:
    """A model's configuration. No code that comes with it is run.

    :param model: directory with a ``config.json``, or a name on the hub
    :raises ValueError: if there is none, transformers does not know it or does not take it, or it asks for more layers
        or experts than a model has
    """
    try:
        if Path(model).is_dir():
            stated = read_json(Path(model) / "config.json")
        else:
            stated, _ = PreTrainedConfig.get_config_dict(model)
        layers, experts = _largest(stated, "layer"), _largest(stated, "expert")
        if layers > _MAX_LAYERS or max(1, layers) * experts > _MAX_EXPERTS:
            raise ValueError(
                f"it has {layers:,} layers of {experts:,} experts; allowed are {_MAX_LAYERS:,} layers and "
                f"{_MAX_EXPERTS:,} experts in all"
            )
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return config
    except Exception as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__, 300)
        raise ValueError(
            f"{printable(model, 300)} is no model that transformers knows; give a directory with a config.json, or a "
            f"name on the hub ({reason})"
        ) from error


def _largest(stated: Any, word: str) -> int:
    """The largest integer under a key that has the word in it."""
    if isinstance(stated, list):
        return max((_largest(item, word) for item in stated), default=0)
    if not isinstance(stated, dict):
        return 0
    here = [value for key, value in stated.items() if word in key and type(value) is int]
    return max([0, *here, *(_largest(value, word) for value in stated.values())])
