"""The lazy exports of `steering_vectors`, and the two forms of `fit`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import steering_vectors
from steering_vectors.errors import FitError
from steering_vectors.fitting.fit import FitOptions, FitSettings, fit
from steering_vectors.models.loading import wrap_model
from tests.steering_vectors.fitting.test_fit import preferences
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

LAZY = "import sys, steering_vectors; dir(steering_vectors); print({'torch', 'transformers'} & sys.modules.keys())"


def test_every_name_is_there_and_documented() -> None:
    for name in steering_vectors.__all__:
        found = getattr(steering_vectors, name)
        assert found.__name__ == name
        assert found.__doc__, name
    assert set(steering_vectors.__all__) <= set(dir(steering_vectors))
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        steering_vectors.magic  # noqa: B018


def test_importing_the_package_loads_no_model_code() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_settings_and_keywords_are_the_same_fields() -> None:
    assert list(FitOptions.__annotations__) == [one.name for one in dataclasses.fields(FitSettings)]


def test_both_forms_of_fit_give_the_same_profile() -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    options = {"name": "kind", "layers": "1", "method": "pca", "calibrate": False}
    one = fit(lm, preferences(), FitSettings(**options))
    other = fit(lm.model, lm.tokenizer, preferences(), **options)
    named = fit(model=lm, tokenizer=None, pairs=preferences(), **options)
    by_keyword = fit(lm, preferences(), settings=FitSettings(**options))
    assert len({profile.content_digest() for profile in (one, other, named, by_keyword)}) == 1
    assert (one.name, one.metrics) == (other.name, other.metrics)


def test_what_fit_takes() -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(FitError, match=r"fit takes \(lm, pairs, settings\) or \(model, tokenizer, pairs\)"):
        fit(lm, None)  # type: ignore[call-overload]
    with pytest.raises(FitError, match="fit takes settings or keyword arguments, not both"):
        fit(lm, preferences(), FitSettings(), name="kind")  # type: ignore[call-overload]
    with pytest.raises(FitError, match="method 'magic' is not one of mean-diff"):
        FitSettings(method="magic")
    with pytest.raises(FitError, match="mean-diff has no option 'rank'; it has none"):
        FitSettings(options={"rank": 2})
