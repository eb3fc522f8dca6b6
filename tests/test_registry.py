import pytest

from detkit.errors import DetkitError
from detkit.registry import Registry


@pytest.fixture
def parts() -> Registry:
    registry = Registry("backbone")
    registry.register("resnet")(lambda depth=18, *, channels=3: (depth, channels))
    return registry


def test_build(parts):
    assert parts.build({"name": "resnet", "depth": 50}, channels=1) == (50, 1)


@pytest.mark.parametrize(
    ("spec", "derived", "message"),
    [
        ({"name": "resnett"}, {}, "unknown backbone 'resnett': known are resnet; did you mean 'resnet'?"),
        ({}, {}, "backbone.name is not set: known are resnet"),
        ({"name": "resnet", "deph": 1}, {}, "backbone 'resnet' takes no argument 'deph'; did you mean 'depth'?"),
        ({"name": "resnet", "channels": 1}, {"channels": 3}, "backbone.channels is derived from the other parts"),
    ],
)
def test_mistakes_are_named(parts, spec, derived, message):
    with pytest.raises(DetkitError) as error:
        parts.build(spec, **derived)
    assert message in str(error.value)


def test_a_name_is_taken_once(parts):
    with pytest.raises(KeyError):
        parts.register("resnet")(dict)
