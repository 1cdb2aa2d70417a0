"""Questions become pieces, scores become answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from espalier.data import Tokens, read_squad
from espalier.data.question_answering import Answers, best_span, cut_pieces


def test_questions_become_pieces(tokenizer_folder: Path, squad_file: Path) -> None:
    tokens = Tokens.read(tokenizer_folder, 96)
    questions = read_squad(squad_file)
    for piece in cut_pieces(tokens, questions):
        question = questions[piece.question]
        start, end = (int(piece.feature.target[name]) - piece.first for name in ("start", "end"))
        said = question.context[piece.offsets[start, 0] : piece.offsets[end, 1]]
        assert said == question.answers[0].text
        whole = tokens.tokenizer.encode(question.text, question.context)
        assert piece.feature.ids.tolist() == whole.ids
        assert piece.feature.types.tolist() == whole.type_ids


def test_long_contexts_are_cut_with_overlap(tokenizer_folder: Path, tmp_path: Path) -> None:
    words = [f"w{i % 60}" for i in range(400)]
    context = " ".join(words)
    start = len(" ".join(words[:250])) + 1
    answer = {"text": words[250], "answer_start": start}
    qas = [{"id": "q", "question": "w1", "answers": [answer]}]
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    tokens = Tokens.read(tokenizer_folder, 204)  # 200 tokens of context in a piece
    pieces = list(cut_pieces(tokens, read_squad(path)))
    assert [int(p.offsets[0, 0]) for p in pieces] == [len(" ".join(words[:n])) + (n > 0) for n in (0, 128, 256)]
    places = [int(p.feature.target["start"]) for p in pieces]
    assert places[0] == places[2] == 0  # the answer is not in these
    assert places[1] == pieces[1].first + 250 - 128


def test_thebest_span() -> None:
    rng = np.random.default_rng(0)
    starts, ends = rng.standard_normal(50), rng.standard_normal(50)
    score, begin, end = best_span(starts, ends)
    scores = starts[:, None] + ends[None, :]
    allowed = np.triu(np.ones((50, 50)), 0) * (1 - np.triu(np.ones((50, 50)), 30)) > 0
    assert score == pytest.approx(scores[allowed].max())
    assert scores[begin, end] == pytest.approx(score)
    assert allowed[begin, end]


def test_real_squad_makes_the_features_of_mlperf(shared_data: Path, tmp_path: Path) -> None:
    from tokenizers import BertWordPieceTokenizer

    squad = shared_data / "squad"
    BertWordPieceTokenizer(str(squad / "vocab.txt"), lowercase=True).save(str(tmp_path / "tokenizer.json"))
    tokens = Tokens.read(tmp_path, 384)
    # A fifth of the file: the whole of it, checked once by hand, makes 10,833 features.
    questions = read_squad(squad / "dev-v1.1.rebuilt.json")[:2000]
    pieces = list(cut_pieces(tokens, questions))
    assert len({p.question for p in pieces}) == 2000
    assert max(len(p.feature.ids) for p in pieces) <= 384


def test_a_token_is_owned_by_the_piece_that_shows_most_around_it(tokenizer_folder: Path, tmp_path: Path) -> None:
    context = " ".join(f"w{i % 60}" for i in range(400))
    answers = [{"text": "w0", "answer_start": 0}]
    qas = [{"id": "q", "question": "w1", "answers": answers}]
    (tmp_path / "long.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    pieces = list(cut_pieces(Tokens.read(tokenizer_folder, 204), read_squad(tmp_path / "long.json")))
    # By the definition, token by token. Pieces: 0 to 199, 128 to 327, 256 to 399.
    spans = [(0, 200), (128, 200), (256, 144)]
    for place in range(400):
        scores = [
            min(place - start, start + length - 1 - place) + 0.01 * length if start <= place < start + length else -1
            for start, length in spans
        ]
        owner = scores.index(max(scores))
        for number, (piece, (start, length)) in enumerate(zip(pieces, spans, strict=True)):
            if start <= place < start + length:
                assert piece.owned[place - start] == (number == owner)
    assert sum(int(piece.owned.sum()) for piece in pieces) == 400


def test_the_best_piece_answers_in_any_order(tokenizer_folder: Path, squad_file: Path) -> None:
    questions = read_squad(squad_file)
    pieces = list(cut_pieces(Tokens.read(tokenizer_folder, 96), questions))
    answers = Answers(questions)
    for piece in reversed(pieces):
        scores = np.zeros((2, len(piece.feature.ids)), np.float32)
        scores[0, piece.feature.target["start"]] = scores[1, piece.feature.target["end"]] = 5
        scores[:, 0] = 9  # outside of the context, hence no answer
        answers.add(piece, *scores)
    assert answers.texts == [question.answers[0].text for question in questions]
