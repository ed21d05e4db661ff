"""What transformers asks of every model that generates, and the streamers."""

import copy
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor
from tests.common.conftest import AUDIO_TOKEN_ID, VOCABULARY, tiny_config, tiny_inputs, tiny_model
from tests.conftest import tone


AUDIO = ("input_features", "input_features_mask")
FIVE = {"max_new_tokens": 5, "min_new_tokens": 5}


def answer(model, inputs, **how) -> torch.Tensor:
    """The new tokens."""
    return model.generate(**inputs, **{**FIVE, **how})[:, inputs["input_ids"].shape[1] :]


def greedy_by_hand(model, inputs, number=5) -> torch.Tensor:
    """Without a cache and without `generate`."""
    inputs, new = dict(inputs), []
    for _ in range(number):
        logits = model(**inputs).logits[:, -1]
        logits[:, [2, AUDIO_TOKEN_ID]] = -torch.inf  # no end before the time, and no placeholder
        new.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new[-1]], 1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return torch.cat(new, 1)


def count_encoded(model) -> list[int]:
    """Batch sizes of the encoder's calls, in a list that fills itself."""
    rows = []
    model.model.audio_tower.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    return rows


# ------------------------------------------------------------------ ways of decoding


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 3},
        {"return_dict_in_generate": True, "output_attentions": False},
    ],
    ids=str,
)
def test_greedy_is_the_argmax_of_forward(model, inputs, how):
    output = model.generate(**inputs, **FIVE, **how)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    length = inputs["input_ids"].shape[1]
    assert torch.equal(sequences[:, :length], inputs["input_ids"])
    assert torch.equal(sequences[:, length:], greedy_by_hand(model, inputs))


@pytest.mark.parametrize(
    "how, rows",
    [
        ({"do_sample": True}, 1),
        ({"do_sample": True, "num_return_sequences": 3}, 3),
        ({"num_beams": 3}, 1),
        ({"num_beams": 3, "num_return_sequences": 2}, 2),
        ({"num_beams": 3, "do_sample": True}, 1),
    ],
    ids=str,
)
def test_other_caches_draw_the_same(model, inputs, how, rows):
    """Sampling and beams read the same logits whichever way the prompt was read; each clip is encoded once."""
    answers = []
    encoded = count_encoded(model)
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"output_hidden_states": True}):
        torch.manual_seed(0)
        output = model.generate(**inputs, **FIVE, **how, **cache, return_dict_in_generate=True)
        answers.append(output.sequences)
    assert all(torch.equal(other, answers[0]) for other in answers[1:])
    assert answers[0].shape == (3 * rows, inputs["input_ids"].shape[1] + 5)
    assert encoded == [3] * 4


def test_more_beams_find_likelier_answers(model, inputs):
    scores = {}
    for beams in (2, 6):
        how = {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True, **FIVE}
        output = model.generate(**inputs, **how)
        scores[beams] = output.sequences_scores
        steps = model.compute_transition_scores(
            output.sequences, output.scores, output.beam_indices, normalize_logits=False
        )
        torch.testing.assert_close(steps.sum(1) / 5, output.sequences_scores)
    assert (scores[6] >= scores[2] - 1e-5).all()


def test_end_of_answer_is_padded(model, inputs):
    expected = greedy_by_hand(model, inputs)
    end = int(expected[1, 1])
    output = model.generate(**inputs, max_new_tokens=5, eos_token_id=end)[:, inputs["input_ids"].shape[1] :]
    for row in range(3):
        tokens = expected[row].tolist()
        stop = tokens.index(end) + 1 if end in tokens else 5
        assert output[row].tolist() == (tokens[:stop] + [0] * 5)[: output.shape[1]]


@pytest.mark.parametrize(
    "how, name",
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "Group Beam Search"),
        ({"dola_layers": "low"}, "Dola Generation"),
    ],
)
def test_what_transformers_gave_away_is_refused_by_name(model, inputs, how, name):
    with pytest.raises(ValueError, match=f"{name} requires `trust_remote_code=True`"):
        model.generate(**inputs, **how)


def test_ones_own_decoding_gets_the_whole_prompt_and_the_audio(model, inputs):
    seen = {}

    def decode(model, input_ids, **kwargs):
        seen.update(kwargs)
        return input_ids

    assert torch.equal(model.generate(**inputs, **FIVE, custom_generate=decode), inputs["input_ids"])
    assert seen["pooled_features"].shape == (3, 10, 24) and seen["cache"].get_seq_length() == 0


class NeverEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, ::2] = -torch.inf
        return scores


class AtLength(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_processors_and_criteria_see_the_whole_prompt(model, inputs):
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([NeverEven()]),
        stopping_criteria=StoppingCriteriaList([AtLength(length + 4)]),
    )
    assert output.shape[1] == length + 4
    assert (output[:, length:] % 2 == 1).all()
    once = model.generate(**inputs, **FIVE, bad_words_ids=[[int(output[0, length])]])
    assert not (once[:, length:] == output[0, length]).any()


# ------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_everything_asked_for_comes_back(inputs, how, use_cache):
    config = tiny_config()
    config._attn_implementation = "eager"
    model = tiny_model(config)
    wanted = ("scores", "logits", "hidden_states", "attentions")
    output = model.generate(
        **inputs,
        **FIVE,
        **how,
        use_cache=use_cache,
        return_dict_in_generate=True,
        **{f"output_{name}": True for name in wanted},
    )
    assert all(len(output[name]) == 5 for name in wanted)
    length, rows = inputs["input_ids"].shape[1], 3 * how.get("num_beams", 1)
    for step in range(5):
        assert output.scores[step].shape == output.logits[step].shape == (rows, VOCABULARY)
        seen = length + step
        new = seen if step == 0 or not use_cache else 1  # the prompt's states are part of the first step
        assert [tuple(h.shape) for h in output.hidden_states[step]] == [(rows, new, 32)] * 3
        assert [tuple(a.shape) for a in output.attentions[step]] == [(rows, 4, new, seen)] * 2
    if use_cache:
        assert output.cache.get_seq_length() == length + 4
    if not how:
        assert torch.equal(torch.stack([s.argmax(-1) for s in output.scores], 1), output.sequences[:, length:])


def test_scores_are_those_of_forward(model, inputs):
    output = model.generate(**inputs, **FIVE, return_dict_in_generate=True, output_logits=True)
    whole = {**inputs, "input_ids": output.sequences}
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    logits = model(**whole, logits_to_keep=6).logits[:, :5]
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ beginnings of other kinds


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_embeddings_in_place_of_ids(model, inputs, how):
    expected = answer(model, inputs, **how)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(answer(model, {**inputs, "inputs_embeds": embeds}, **how), expected)
    without_ids = {name: value for name, value in inputs.items() if name != "input_ids"}
    encoded = count_encoded(model)
    # There is no prompt to return: the answer alone.
    assert torch.equal(model.generate(**without_ids, inputs_embeds=embeds, **FIVE, **how), expected)
    assert encoded == [3]


def test_embeddings_with_the_audio_in_them(model, inputs):
    expected = answer(model, inputs)
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.masked_scatter((inputs["input_ids"] == AUDIO_TOKEN_ID)[..., None], audio)
    output = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **FIVE)
    assert torch.equal(output, expected)


def test_ids_by_position_and_without_a_mask(model):
    inputs = tiny_inputs(0)
    expected = answer(model, inputs)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    assert mask.all()
    output = model.generate(ids, **inputs, **FIVE)
    assert torch.equal(output[:, ids.shape[1] :], expected)


def test_padding_is_no_text_where_no_mask_says_so(model, inputs):
    assert not inputs["attention_mask"].all()
    expected = answer(model, inputs)
    assert torch.equal(answer(model, {**inputs, "attention_mask": None}), expected)


def test_prompt_that_ends_with_audio(model):
    inputs = tiny_inputs(0, 1)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :-8]
    expected = greedy_by_hand(model, inputs)
    for how in ({}, {"num_beams": 1, "num_return_sequences": 1}, {"use_cache": False}):
        assert torch.equal(answer(model, inputs, **how), expected)
    assert answer(model, inputs, num_beams=3).shape == (2, 5)


@pytest.mark.parametrize("how", [{}, {"use_cache": False}], ids=str)
def test_two_clips_in_one_prompt(model, how):
    """Each row has two clips; the same answer comes out where the cache cannot be filled beforehand."""
    one, other = tiny_inputs(0), tiny_inputs(1)
    inputs = {name: torch.cat([one[name], other[name], other[name], one[name]]) for name in AUDIO}
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([torch.cat([one[name], other[name]], 1), torch.cat([other[name], one[name]], 1)])
    assert torch.equal(answer(model, inputs, **how), greedy_by_hand(model, inputs))


@pytest.mark.parametrize("new_ids_alone", [False, True])
def test_going_on_from_a_cache(model, inputs, new_ids_alone):
    whole = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    begun = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    ids = begun.sequences[:, -1:] if new_ids_alone else begun.sequences
    encoded = count_encoded(model)
    for name in ("cache", "past_key_values"):  # the latter is the old name, which transformers takes until 5.40
        cache = {name: copy.deepcopy(begun.cache)}
        ended = model.generate(
            **{**inputs, "input_ids": ids, "attention_mask": mask, **cache}, max_new_tokens=3, min_new_tokens=3
        )
        assert torch.equal(ended[:, -3:], whole[:, -3:])
    assert encoded == []  # the clips are in the cache


def test_second_question_with_the_first_ones_cache(model):
    """Two turns of a chat: the second goes on from the first one's cache and reads its own tokens alone."""
    inputs = tiny_inputs(1)
    first = model.generate(**inputs, **FIVE, return_dict_in_generate=True)
    more = torch.tensor([[7, 9, 11]])
    second = {**inputs, "input_ids": torch.cat([first.sequences, more], 1)}
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    assert torch.equal(answer(model, {**second, "cache": first.cache}), greedy_by_hand(model, second))


def test_a_cache_of_ones_own(model, inputs):
    expected = answer(model, inputs)
    for cache in (DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, 40)):
        assert torch.equal(answer(model, {**inputs, "cache": cache}), expected)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 4


# ------------------------------------------------------------------ drafts


@pytest.mark.parametrize("assistant", ["itself", "a smaller one", "another", "text alone"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_generation(model, assistant, do_sample):
    inputs = tiny_inputs(1)
    assistants = {
        "itself": lambda: model,
        "a smaller one": lambda: tiny_model(tiny_config(layers=1)),
        "another": lambda: tiny_model(seed=9),
    }
    if assistant == "text alone":
        torch.manual_seed(1)
        helper = LlamaForCausalLM(tiny_config().text_config).eval()
        with pytest.raises(ValueError, match="pooled_features"):
            model.generate(**inputs, **FIVE, assistant_model=helper)
        return
    helper = assistants[assistant]()
    torch.manual_seed(0)
    drafted = answer(model, inputs, assistant_model=helper, do_sample=do_sample)
    assert drafted.shape == (1, 5)
    if not do_sample:
        assert torch.equal(drafted, greedy_by_hand(model, inputs))
        output = model.generate(
            **inputs, **FIVE, assistant_model=helper, return_dict_in_generate=True, output_scores=True
        )
        assert len(output.scores) == 5 and torch.equal(output.sequences[:, -5:], drafted)


def test_prompt_lookup_reads_the_audio(model):
    inputs = tiny_inputs(0)
    inputs["input_ids"][:, -8:] = torch.tensor([5, 6, 7, 8, 5, 6, 7, 8])
    encoded = count_encoded(model)
    output = answer(model, inputs, prompt_lookup_num_tokens=3)
    assert encoded == [1]
    assert torch.equal(output, greedy_by_hand(model, inputs))


# ------------------------------------------------------------------ streaming


@pytest.fixture(scope="module")
def speaking(tiny_whisper, tiny_llama):
    torch.manual_seed(0)
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
    return model, SenseProcessor.from_backbones(tiny_whisper, tiny_llama)


WAYS = [
    {},
    {"do_sample": True},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 2},
]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_text_streamer_prints_the_answer_alone(speaking, how, capsys):
    model, processor = speaking
    inputs = processor.apply_transcription_request(tone(0.5))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, **how}
    for reader in (processor.tokenizer, processor):
        torch.manual_seed(0)
        streamer = TextStreamer(reader, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(**inputs, **options, streamer=streamer)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert len(new) == 12
        assert capsys.readouterr().out == processor.decode(new, skip_special_tokens=True) + "\n"


def test_text_streamer_prints_the_prompt_once_where_asked(speaking, capsys):
    model, processor = speaking
    inputs = processor.apply_transcription_request(tone(0.5))
    output = model.generate(**inputs, max_new_tokens=6, streamer=TextStreamer(processor.tokenizer))
    assert capsys.readouterr().out == processor.decode(output[0]) + "\n"


class LettersAlone(LogitsProcessor):
    """Text that a streamer hands on at once: it keeps symbols back until the next space."""

    def __init__(self, tokenizer):
        self.others = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).strip().isalpha()]

    def __call__(self, input_ids, scores):
        scores[:, self.others] = -torch.inf
        return scores


def test_iterator_streams_while_the_model_generates(speaking):
    model, processor = speaking
    inputs = processor.apply_transcription_request(tone(0.8))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    letters, outputs = LogitsProcessorList([LettersAlone(processor.tokenizer)]), []

    def run():
        outputs.append(model.generate(**inputs, max_new_tokens=16, logits_processor=letters, streamer=streamer))

    thread = threading.Thread(target=run)
    thread.start()
    pieces = list(streamer)
    thread.join()
    new = outputs[0][0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == processor.decode(new, skip_special_tokens=True)
    assert sum(bool(piece) for piece in pieces) == 16  # token by token, not at the end


def test_streamers_take_one_sequence(speaking):
    model, processor = speaking
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    with pytest.raises(ValueError, match="only supports batch size 1"):
        model.generate(**processor.apply_transcription_request([tone(0.5)] * 2), streamer=streamer)
    with pytest.raises(ValueError, match="streamer.*beam"):
        model.generate(**processor.apply_transcription_request(tone(0.5)), streamer=streamer, num_beams=2)
