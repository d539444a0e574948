"""generation_config.json: what is taken over, what is rounded, what is not implemented and told in one line."""

import json

import pytest

from input_folder import default_sampling
from sampling import SamplingParams


@pytest.fixture
def sampling(tmp_path):
    def read(text, chosen=None):
        (tmp_path / "generation_config.json").write_text(text if isinstance(text, str) else json.dumps(text))
        return default_sampling(tmp_path, SamplingParams, chosen)

    return read


@pytest.mark.parametrize(
    "config, want",
    [
        ({}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": -1.0}, {"top_k": 0}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"temperature": 1e-6}, {"temperature": 0}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 1e-3, "top_p": 1, "min_p": 0}, {"temperature": 1e-3, "top_p": 1, "min_p": 0}),
        ({"temperature": None, "top_k": None, "do_sample": None}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, {"temperature": 0}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
    ],
)
def test_values(sampling, capsys, config, want):
    assert sampling(config) == SamplingParams(**want)
    assert capsys.readouterr().err == ""


def test_top_p_of_zero_leaves_the_most_probable_token(sampling):
    assert 0 < sampling({"top_p": 0}).top_p <= 1e-6  # a vocabulary has at most 1e6 ids, so the largest share is above
    assert sampling({"top_p": 0.0}, {"top_p": 0.9}).top_p == 0.9


@pytest.mark.parametrize(
    "config", [{"top_k": 20.5}, {"top_k": "20"}, {"top_k": True}, {"top_k": -2}, {"temperature": -1}, {"top_p": -0.1},
               {"top_p": 1.5}, {"temperature": "hot"}, {"do_sample": 1}, '{"top_k": 1e999}', '{"top_p": NaN}',
               '{"temperature": Infinity}']
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(sampling, config):
    with pytest.raises(ValueError, match="generation_config.json: (top_k|top_p|temperature|do_sample) is ") as caught:
        sampling(config)
    assert "\n" not in str(caught.value)


ON = {
    "num_beams": 4, "typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "suppress_tokens": [7],
    "begin_suppress_tokens": [7], "forced_bos_token_id": 0, "forced_eos_token_id": 2, "sequence_bias": {"1": -1.0},
    "stop_strings": ["###"], "guidance_scale": 1.5, "min_new_tokens": 5, "presence_penalty": 1.5,
    "exponential_decay_length_penalty": [15, 1.6], "epsilon_cutoff": 3e-4, "watermarking_config": {"bias": 2.5},
}  # fmt: skip
OFF = {
    "num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": [],
    "forced_eos_token_id": None, "sequence_bias": {}, "stop_strings": [], "guidance_scale": None, "min_length": 0,
    "num_return_sequences": 1, "max_new_tokens": 2048, "pad_token_id": 0, "use_cache": False, "repetition_penalty": 1.0,
    "output_scores": True, "length_penalty": 1.0, "transformers_version": "4.37.0", "cache_implementation": "hybrid",
}  # fmt: skip


def test_what_is_not_implemented_is_told_in_one_line(sampling, capsys):
    for name, value in ON.items():
        sampling({name: value})
        line = capsys.readouterr().err
        assert line.startswith("warning: ") and f"generation_config.json sets {name}: not implemented" in line
        assert line.count("\n") == 1
    sampling(ON)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(name in line for name in ON)
    sampling(OFF)
    assert capsys.readouterr().err == ""


def test_a_penalty_is_used(sampling, capsys):
    params = sampling({"repetition_penalty": 1.05, "do_sample": False})
    assert params == SamplingParams(temperature=0.0, repetition_penalty=1.05)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="repetition_penalty is -1; it must be 0.01 to 100"):
        sampling({"repetition_penalty": -1})


def test_one_rank_speaks(sampling, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    sampling(ON)
    assert capsys.readouterr().err == ""


def test_config_json_counts_where_there_is_no_other(tmp_path, capsys):
    """Older folders keep their settings there, and transformers takes them up."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "top_k": 7, "suppress_tokens": [5]}))
    assert default_sampling(tmp_path, SamplingParams, None) == SamplingParams(top_k=7)
    assert "config.json sets suppress_tokens: not implemented" in capsys.readouterr().err
    (tmp_path / "generation_config.json").write_text("{}")
    assert default_sampling(tmp_path, SamplingParams, None) == SamplingParams()
    assert capsys.readouterr().err == ""
