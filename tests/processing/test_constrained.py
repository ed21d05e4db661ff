"""Constrained decoding: whatever the scores are, answers keep to their task's grammar and end within their limit."""

import re
import unicodedata
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

import eval_sense
from processing import SenseProcessor, SpokenLanguageUnderstandingPipeline
from processing.answer_grammar import Grammar, OneOf, TaggedWords
from processing.constrained import GrammarConstraint, TokenGrammar, token_bytes
from processing.pipeline_sense import answer_settings
from processing.tasks import COMBINED_TAGS, RAW_TAGS, SENTIMENTS, TASKS, EntityTask, Task, read_tags, write_tags
from tests.conftest import SPECIAL_TOKENS, make_corpus, make_tokenizer, tone, write_corpus


NER, SA = TASKS["ner"].grammar(), TASKS["sa"].grammar()
TAGGED = re.compile(rf"([^<>]|<({'|'.join(COMBINED_TAGS)})>[^<>]*[^<>\s][^<>]*</\2>)*")
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_merged_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with tokens that hold parts of tags and of characters."""
    tokenizer = Tokenizer(models.BPE())
    # Without the usual pattern, tokens reach over tags and spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL_TOKENS, "[INST]"]  # decoding drops it, though it has no < of its own
    how = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tagged = ["<PERSON> anna </PERSON> left <PLACE> moscow", "</PLACE> Positive Neutral", "<script> a\u00a0b\u3000 é"]
    tokenizer.train_from_iterator(tagged * 4, trainers.BpeTrainer(vocab_size=380, **how))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["[INST]"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: spaces are ▁, bytes of what it does not know are tokens of their own."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += ["▁<", "</", "▁</", "PER", "SON>", "<PER", "><", ">▁", "▁anna", "Pos", "itive", "\u00a0", "\u3000", "é"]
    pieces += [chr(code) for code in range(0x21, 0x7F)]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZERS = {"bytes": make_tokenizer(), "merged": make_merged_tokenizer(), "sentencepiece": make_sentencepiece()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture(scope="module")
def llms():
    """By tokenizer, a random language model; of more tokens than its tokenizer, as padded ones are."""
    torch.manual_seed(0)
    found, small = {}, {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    for name, tokenizer in TOKENIZERS.items():
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = LlamaConfig(vocab_size=len(tokenizer) + 5, bos_token_id=None, **special, **small)
        found[name] = LlamaForCausalLM(config).eval()
    return found


class RandomScores(LogitsProcessor):
    """A model of its own at every step, that likes some tokens."""

    def __init__(self, seed: int, liked: list[int]):
        self.generator, self.liked = torch.Generator().manual_seed(seed), liked

    def __call__(self, input_ids, scores):
        scores = 3 * torch.randn(scores.shape, generator=self.generator)
        scores[:, self.liked] += 6
        return scores


class Wants(LogitsProcessor):
    """A model that writes one text, or one for each row, again and again, whatever it is asked."""

    def __init__(self, *texts: list[int]):
        self.texts, self.start = texts, None

    def __call__(self, input_ids, scores):
        self.start = self.start or input_ids.shape[1]
        at, beams = input_ids.shape[1] - self.start, -(-len(input_ids) // len(self.texts))
        for row in range(len(input_ids)):
            ids = self.texts[row // beams]
            scores[row, ids[at % len(ids)]] += 100
        return scores


def generate(llm, tokenizer, grammars, limits, model: LogitsProcessor | None, constrained=True, **how) -> list[str]:
    """The answers to one prompt, a row for each grammar."""
    constraint = GrammarConstraint(grammars, tokenizer, limits) if constrained else None
    settings = answer_settings(limits, constraint)
    settings["logits_processor"] = [*([model] if model else []), *settings.get("logits_processor", [])]
    prompt = torch.full((len(grammars), 3), 5)
    output = llm.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **how)
    return [text.strip() for text in tokenizer.batch_decode(output[:, 3:], skip_special_tokens=True)]


def check(grammar, text: str):
    if grammar == SA:
        assert text in SENTIMENTS
    elif grammar == NER:
        answer = read_tags(text)
        assert answer.malformed == 0 and {tag for tag, _, _ in answer.entities} <= set(COMBINED_TAGS), text
        assert TAGGED.fullmatch(text), text
        assert not any(unicodedata.category(char) == "Cc" or char == "\u202e" for char in text), ascii(text)


def marks(tokenizer) -> list[int]:
    """The tokens that tags are made of, and the end."""
    pieces = token_bytes(tokenizer)
    return [tokenizer.eos_token_id, *(i for i, piece in enumerate(pieces) if piece and set(piece) & set(b"<>/"))]


@QUICK
@given(
    seed=st.integers(0, 2**32),
    num_beams=st.integers(1, 3),
    rows=st.lists(st.tuples(st.sampled_from([NER, NER, SA, None]), st.integers(0, 40)), min_size=1, max_size=3),
    likes_marks=st.booleans(),
)
def test_answers_of_random_models_keep_to_the_grammar(tokenizer, llms, seed, num_beams, rows, likes_marks):
    llm = next(llms[name] for name, other in TOKENIZERS.items() if other is tokenizer)
    least = {NER: 1, SA: TokenGrammar(SA, tokenizer).shortest, None: 1}
    grammars, limits = [grammar for grammar, _ in rows], [least[grammar] + more for grammar, more in rows]
    model = RandomScores(seed, marks(tokenizer) if likes_marks else [])
    texts = generate(llm, tokenizer, grammars, limits, model, num_beams=num_beams)
    for grammar, text in zip(grammars, texts, strict=True):
        check(grammar, text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_opened_is_closed_within_any_limit(llms, name):
    tokenizer = TOKENIZERS[name]
    limits = list(range(1, 41))
    endless = Wants(tokenizer("<PERSON> anna", add_special_tokens=False)["input_ids"] + tokenizer.encode("a") * 60)
    how = {"num_beams": 1}
    free = generate(llms[name], tokenizer, [NER] * 40, limits, endless, constrained=False, **how)
    assert read_tags(free[-1]).malformed == 1
    endless.start = None
    texts = generate(llms[name], tokenizer, [NER] * 40, limits, endless, **how)
    for text in texts:
        check(NER, text)
    assert texts[-1].startswith("<PERSON> anna") and "</PERSON>" in texts[-1] and "<" not in texts[0]


ATTACKS = [
    "<PERSON> anna </PERSON> <script> alert </script>",
    "<PERSON> anna <PLACE> moscow </PLACE> </PERSON>",
    "<PERSON></PERSON> <PERSON> </PERSON>",
    "<PERSON> \u00a0\u3000 </PERSON>",
    "</PERSON> anna <person> anna </person>",
    "<PERSON> anna </PLACE> </PERSO",
    "<EVENT> war </EVENT> < PERSON > anna",
    "Ignore this. Very Positive, or Negative",
    '{"sentiment": "Positive"}',
    "positive\n\x1b[31mNeutral",
    "<PERSON> anna\u009b31m \u202e </PERSON>",
]


@pytest.mark.parametrize(("name", "num_beams"), product(TOKENIZERS, (1, 3)))
def test_no_text_that_a_model_is_made_to_write_changes_the_grammar(llms, name, num_beams):
    tokenizer = TOKENIZERS[name]
    special = tokenizer.all_special_ids
    inside = tokenizer("<PERSON> anna", add_special_tokens=False)["input_ids"]
    wanted = [tokenizer(attack, add_special_tokens=False)["input_ids"] for attack in ATTACKS]
    wanted += [special, [*inside, tokenizer.eos_token_id], [*inside, *special, *inside]]
    opened, closed = tokenizer(["<PERSON>", "</PERSON>"], add_special_tokens=False)["input_ids"]
    wanted += [[*opened, token, *closed] for token in special]
    if name == "sentencepiece":  # < as a byte beside a broken character: decoding loses both
        lost = tokenizer.convert_tokens_to_ids(["<0xFF>", "<0x3C>"])
        wanted.append([*inside, *lost, *tokenizer.convert_tokens_to_ids(["/", "PER", "SON>"])])
    number = len(wanted)
    asked = [NER] * number + [SA] * number, [40] * number + [20] * number
    how = {"num_beams": num_beams}
    free = generate(llms[name], tokenizer, *asked, Wants(*wanted, *wanted), constrained=False, **how)
    assert sum(read_tags(text).malformed > 0 for text in free[:number]) > 5 and not set(free[number:]) & set(
        SENTIMENTS
    )
    texts = generate(llms[name], tokenizer, *asked, Wants(*wanted, *wanted), **how)
    for grammar, text in zip(asked[0], texts, strict=True):
        check(grammar, text)


WORDS = st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="<>▁"), min_size=1, max_size=5)


@QUICK
@given(words=st.lists(st.tuples(WORDS, st.sampled_from([None, None, *COMBINED_TAGS])), max_size=6))
def test_true_answers_stay_possible_to_their_last_token(tokenizer, words):
    text, entities = "", []
    for word, tag in words:
        text += " " * bool(text)
        entities += [[tag, len(text), len(word)]] if tag else []
        text += word
    targets = {NER: write_tags(text, entities), SA: SENTIMENTS[len(text) % 3]}
    for grammar, target in targets.items():
        ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        constraint = GrammarConstraint([grammar], tokenizer, [max(len(ids), 1)])
        for n in range(len(ids)):
            scores = constraint(torch.tensor([[5, *ids[:n]]]), torch.zeros(1, len(tokenizer)))
            assert scores[0, ids[n]] == 0, tokenizer.convert_ids_to_tokens(ids[: n + 1])
        ended = GrammarConstraint([grammar], tokenizer, [len(ids) + 1])
        ended.start, ended.length, ended.classes = 1, len(ids), {p: p.classes for p in ended.rows}
        assert ended(torch.tensor([[5, *ids]]), torch.zeros(1, len(tokenizer)))[0, tokenizer.eos_token_id] == 0


def test_only_what_breaks_the_grammar_is_ruled_out(tokenizer):
    pieces, scores = token_bytes(tokenizer), torch.randn(1, len(tokenizer) + 5)
    found = GrammarConstraint([NER], tokenizer, [100])(torch.tensor([[5]]), scores)[0]
    for token, piece in enumerate(pieces):
        if piece and piece.isascii() and piece.decode().isprintable() and not set(piece) & set(b"<>"):
            assert found[token] == scores[0, token], piece
        if piece is None and token != tokenizer.eos_token_id:
            assert found[token] == -torch.inf
    assert (found[len(tokenizer) :] == -torch.inf).all()


def test_nothing_follows_an_end_that_the_model_does_not_stop_at(llms, tokenizer):
    llm = next(llms[name] for name, other in TOKENIZERS.items() if other is tokenizer)
    wants = Wants([tokenizer.eos_token_id, *tokenizer("<script>", add_special_tokens=False)["input_ids"]])
    assert generate(llm, tokenizer, [NER], [20], wants, eos_token_id=len(tokenizer)) == [""]


def test_rows_without_a_grammar_are_left_alone(tokenizer):
    scores = torch.randn(4, len(tokenizer))
    found = GrammarConstraint([None, SA], tokenizer, [9, 9])(torch.full((4, 3), 5), scores)
    assert torch.equal(found[:2], scores[:2]) and (found[2:] == -torch.inf).any(1).all()  # two beams each


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_grammar_goes_before_other_processors(llms, name):
    tokenizer = TOKENIZERS[name]
    how = {"suppress_tokens": marks(tokenizer), "repetition_penalty": 3.0}  # no tag could be closed, no answer end
    for num_beams in (1, 2):
        wants = Wants(tokenizer("<PERSON> anna", add_special_tokens=False)["input_ids"])
        texts = generate(llms[name], tokenizer, [NER, SA], [30, 20], wants, num_beams=num_beams, **how)
        check(NER, texts[0])
        check(SA, texts[1])


# ------------------------------------------------------------------ grammars


def accepts(grammar: Grammar, text: bytes) -> bool:
    state = grammar.start
    for byte in text:
        state = grammar.step(state, byte)
        if state is None:
            return False
    return grammar.is_complete(state)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("", True),
        (" anna left", True),
        ("<PERSON> anna </PERSON>", True),
        ("<PERSON>анна</PERSON><PLACE>東京 é’</PLACE>", True),
        ("<PERSON> anna", False),
        ("<PERSON> </PERSON>", False),
        ("<PERSON>\u2003</PERSON>", False),
        ("a\u00a0b", False),
        ("a\nb", False),
        ("<PERSON> a <PERSON> b </PERSON> </PERSON>", False),
        ("<DATE> a </DATE>", False),
        ("a > b", False),
        ("</PERSON>", False),
        ("<person> a </person>", False),
    ],
)
def test_tagged_words(text, is_one):
    assert accepts(NER, text.encode()) is is_one


def test_a_broken_character_counts_as_one():
    assert accepts(NER, b"<PERSON>\xe2\x80</PERSON>") and not accepts(NER, b"<PERSON>\xe2\x80\x83</PERSON>")


def test_one_of():
    grammar = OneOf(("no", "none", "sí"))
    assert all(accepts(grammar, text.encode()) for text in ("no", " none", "sí"))
    assert not any(accepts(grammar, text.encode()) for text in ("", " ", "  no", "non", "nones", "NO", "s"))


@dataclass(frozen=True)
class Digits(Grammar):
    start = 0

    def step(self, number, byte):
        return number + 1 if number < 3 and chr(byte).isdecimal() else None

    def is_complete(self, number):
        return number > 0


def test_a_task_of_ones_own_brings_its_grammar(llms, tokenizer, monkeypatch, parts):
    llm = next(llms[name] for name, other in TOKENIZERS.items() if other is tokenizer)
    for seed in range(5):
        (text,) = generate(llm, tokenizer, [Digits()], [9], RandomScores(seed, []))
        assert re.fullmatch("[0-9]{1,3}", text)

    class Chosen(Task):
        name, label, classes = "chosen", "text", ("yes", "no")

    assert Chosen.grammar() == OneOf(("yes", "no")) and TASKS["asr"].grammar() is None
    monkeypatch.setitem(TASKS, "chosen", Chosen)
    assert list(parts[1].constrain(["asr", "chosen"], [9, 9]).rows.values()) == [[1]]


# ------------------------------------------------------------------ what is refused


def test_what_is_refused(tokenizer, parts):
    with pytest.raises(ValueError, match="max_new_tokens 0: the shortest answer of OneOf.* takes [0-9] tokens"):
        GrammarConstraint([SA], tokenizer, [0])
    with pytest.raises(ValueError, match="2 grammars and 1 limits"):
        GrammarConstraint([SA, NER], tokenizer, [9])
    constraint = GrammarConstraint([NER], tokenizer, [9])
    constraint(torch.full((1, 3), 5), torch.zeros(1, len(tokenizer)))
    with pytest.raises(ValueError, match="used before"):
        constraint(torch.full((1, 3), 5), torch.zeros(1, len(tokenizer)))
    with pytest.raises(ValueError, match="there is no task 'colours'"):
        parts[1].constrain(["colours"], [9])
    with pytest.raises(ValueError, match="entity_tags 'all': give one of raw, combined"):
        SenseProcessor(parts[1].feature_extractor, parts[1].tokenizer, entity_tags="all")


def test_tokenizers_that_are_refused():
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="its decoder is WordPiece; constrained decoding reads"):
        TokenGrammar(NER, PreTrainedTokenizerFast(tokenizer_object=wordpiece, eos_token="[UNK]"))
    with pytest.raises(ValueError, match="no eos_token"):
        TokenGrammar(NER, PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["bytes"].backend_tokenizer))
    with pytest.raises(ValueError, match="can't write one answer of OneOf"):
        TokenGrammar(OneOf(()), TOKENIZERS["bytes"])


def test_a_grammar_without_end_is_refused():
    class Counts(Grammar):
        start = 0

        def step(self, number, byte):
            return number + 1

    with pytest.raises(ValueError, match="has more than 10,000 states"):
        TokenGrammar(Counts(), TOKENIZERS["bytes"])


# ------------------------------------------------------------------ where it is used


def test_the_tag_set_is_the_models_own(parts, tmp_path):
    kinds = {"feature_extractor": parts[1].feature_extractor, "tokenizer": parts[1].tokenizer}
    SenseProcessor(**kinds, entity_tags="raw").save_pretrained(tmp_path)
    constraint = SenseProcessor.from_pretrained(tmp_path).constrain(["ner"], [99])
    (prepared,) = constraint.rows
    known = {TokenGrammar(TaggedWords(RAW_TAGS), parts[1].tokenizer).following.shape}
    assert {prepared.following.shape} == known and EntityTask.grammar() == TaggedWords(COMBINED_TAGS)


def test_understand_takes_it(parts):
    model, processor = parts
    wants = Wants(processor.tokenizer("<PERSON> anna <script>", add_special_tokens=False)["input_ids"])
    for num_beams in (1, 2):
        wants.start = None
        constraint = processor.constrain(["ner", "sa"] * 2, [40, 20] * 2)
        how = {"processor": processor, "max_new_tokens": 40, "num_beams": num_beams}
        found = model.understand([tone(1), tone(2)], ("ner", "sa"), logits_processor=[wants, constraint], **how)
        for text in found["ner"]:
            check(NER, text)
            assert text.startswith("<PERSON> anna")
        assert set(found["sa"]) <= set(SENTIMENTS)


def test_the_pipeline_takes_it_beside_processors_of_ones_own(parts):
    pipe = SpokenLanguageUnderstandingPipeline(*parts, device="cpu")
    wants = Wants(parts[1].tokenizer("<PERSON> anna" + " anna" * 30, add_special_tokens=False)["input_ids"])
    how = {"generate_kwargs": {"logits_processor": [wants], "max_new_tokens": 30}, "return_sentiment": False}
    assert pipe(tone(2), **how)["entities"] == []
    wants.start = None
    found = pipe(tone(2), constrained=True, **how)
    assert found["entities"][0]["entity"] == "PERSON" and found["entities"][0]["word"].startswith("anna")


def test_eval_sense_takes_it(saved, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", test=3)
    ask = ["--model", saved, "--dataset", corpus, "--tasks", "ner", "sa", "--num_beams", "2"]
    found = {}
    for name, options in {"free": [], "constrained": ["--constrained"]}.items():
        found[name] = eval_sense.main([*ask, *options, "--output_dir", str(tmp_path / name)])
    assert found["free"]["sa_malformed_rate"] == 100
    assert found["constrained"]["sa_malformed_rate"] == found["constrained"]["ner_malformed_rate"] == 0
    assert [found[name]["measured_on"]["constrained"] for name in found] == [False, True]


def test_the_control_that_reads_the_true_text_takes_it_too(parts):
    free, kept = (eval_sense.understand_text(*parts, make_corpus(2), ["sa"], constrained=c)["sa"] for c in (0, 1))
    assert set(kept) <= set(SENTIMENTS) and not set(free) & set(SENTIMENTS)
