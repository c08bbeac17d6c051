# ruff: noqa: E501
"""Instructions that can be verified, English and Chinese; English ones as if-verifiable's checkers see them."""

import json
import time
from pathlib import Path

import pytest

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers import make_scorers
from nemo_bluelm.evaluate.scorers.instruction_checks import CHECKS, follows
from nemo_bluelm.evaluate.scorers.instruction_text import count_sentences, language, words

GOLDEN = json.loads((Path(__file__).parent / "ifeval_cases.json").read_text(encoding="utf-8"))
IFEVAL = """keywords:existence keywords:frequency keywords:forbidden_words keywords:letter_frequency
language:response_language length_constraints:number_sentences length_constraints:number_paragraphs
length_constraints:number_words length_constraints:nth_paragraph_first_word detectable_content:number_placeholders
detectable_content:postscript detectable_format:number_bullet_lists detectable_format:constrained_response
detectable_format:number_highlighted_sections detectable_format:multiple_sections detectable_format:json_format
detectable_format:title combination:two_responses combination:repeat_prompt startend:end_checker
change_case:capital_word_frequency change_case:english_capital change_case:english_lowercase punctuation:no_comma
startend:quotation""".split()


def scorer(**options):
    (made,) = make_scorers({"instructions": options}, "test")
    return made


@pytest.mark.parametrize("name, kwargs, verdict", GOLDEN["cases"], ids=str)
def test_as_the_oracle_sees_it(name, kwargs, verdict):
    found = "".join(str(int(follows(text, name, kwargs))) for text in GOLDEN["texts"])
    assert found == verdict
    assert len(set(verdict)) == 2  # both verdicts are there


def test_all_of_ifeval_is_there():
    assert set(IFEVAL) <= set(CHECKS)


@pytest.mark.parametrize(
    "text, name, kwargs, right",
    [
        ("今天天气很好，我们去公园。", "length_constraints:number_words", {"num_words": 11, "relation": "at least"}, True),
        ("今天 GPT 很好。", "length_constraints:number_words", {"num_words": 5, "relation": "exactly"}, True),
        ("今天很好。", "length_constraints:number_characters", {"num_characters": 5, "relation": "at most"}, True),
        ("今天很好。", "length_constraints:number_characters", {"num_characters": 5, "relation": "less than"}, False),
        ("好！真的？是的。", "length_constraints:number_sentences", {"num_sentences": 3, "relation": "exactly"}, True),
        ("Mr. Li has 3.5 kg. Good!", "length_constraints:number_sentences", {"num_sentences": 2, "relation": "exactly"}, True),
        ("春天来了", "keywords:existence", {"keywords": ["春天"]}, True),
        ("春天来了", "keywords:forbidden_words", {"forbidden_words": ["天来"]}, False),
        ("concatenate", "keywords:forbidden_words", {"forbidden_words": ["cat"]}, True),
        ("好，好", "punctuation:no_comma", {}, False),
        ("好！好", "punctuation:no_marks", {"marks": "，！"}, False),
        ("“引用。”", "startend:quotation", {}, True),
        ("《静夜思》\n床前明月光", "detectable_format:title", {}, True),
        ("看《静夜思》", "detectable_format:title", {}, False),
        ("【姓名】你好【地址】", "detectable_content:number_placeholders", {"num_placeholders": 2}, True),
        ("第一节 起\n第二节 承", "detectable_format:multiple_sections", {"section_spliter": "第", "num_sections": 2}, True),
        ("一。\n\n其次，二。", "length_constraints:nth_paragraph_first_word",
         {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "其次"}, True),
        ("好的。附注：写信", "detectable_content:postscript", {"postscript_marker": "附注"}, True),
        ("我的答案是不确定。", "detectable_format:constrained_response", {}, True),
        ("首先，谢谢。再见", "startend:start_checker", {"start_phrase": "首先"}, True),
        ("谢谢。完毕", "startend:end_checker", {"end_phrase": "完毕"}, True),
        ("1. a\n2. b\n3. c", "detectable_format:numbered_list", {"num_items": 3}, True),
        ("1. a\n3. c", "detectable_format:numbered_list", {"num_items": 2}, False),
        ("NASA and UN", "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, True),
        ("ALL CAPITALS.", "change_case:english_capital", {}, True),
        ("Not all", "change_case:english_capital", {}, False),
        ("all small.", "change_case:english_lowercase", {}, True),
        ("全是中文", "change_case:english_lowercase", {}, False),
        ("a b c", "keywords:existence", {"keywords": ["A"], "frequency": None}, True),  # what is None doesn't count
        ("   ", "punctuation:no_comma", {}, False),
    ],
)  # fmt: skip
def test_by_hand(text, name, kwargs, right):
    assert follows(text, name, kwargs) is right


@pytest.mark.parametrize(
    "text, code",
    [
        ("The cat sat on the mat and it was happy with that.", "en"),
        ("Die Katze ist auf dem Tisch und das ist nicht gut.", "de"),
        ("Le chat est sur la table et il ne veut pas partir.", "fr"),
        ("El gato está en la mesa y no quiere salir de casa.", "es"),
        ("Il gatto è sul tavolo e non vuole uscire con il cane.", "it"),
        ("O gato está na mesa e não quer sair com o cão.", "pt"),
        ("Con mèo ở trên bàn và nó không muốn đi với tôi.", "vi"),
        ("Paka yuko kwenye meza na hataki kwenda kwa watu wa nyumba hii.", "sw"),
        ("Kissa on pöydällä ja se ei halua lähteä, mutta koira on kotona.", "fi"),
        ("Кошка на столе, и она не хочет уходить из дома.", "ru"),
        ("Котката е на масата и не иска да си ходи с кучето.", "bg"),
        ("القط على الطاولة ولا يريد أن يذهب إلى البيت مع هذا الكلب.", "ar"),
        ("گربه روی میز است و نمی خواهد از این خانه برود.", "fa"),
        ("بلی میز پر ہے اور وہ گھر سے نہیں جانا چاہتی ہے۔", "ur"),
        ("बिल्ली मेज पर है और वह घर से नहीं जाना चाहती है।", "hi"),
        ("मांजर टेबलावर आहे आणि ते घरातून जाणार नाही.", "mr"),
        ("猫在桌子上，它不想离开这个家。", "zh-cn"),
        ("貓在桌子上，牠不想離開這個家，我們說話。", "zh-tw"),
        ("我们用 Python 和 PyTorch 训练大模型", "zh-cn"),
        ("猫はテーブルの上にいて、家を出たくありません。", "ja"),
        ("고양이는 탁자 위에 있고 집을 떠나고 싶지 않다.", "ko"),
        ("แมวอยู่บนโต๊ะ", "th"),
        ("ਬਿੱਲੀ ਮੇਜ਼ ਤੇ ਹੈ", "pa"),
        ("బిల్లి బల్ల మీద ఉంది", "te"),
        ("12345 !!!", None),
    ],
)
def test_the_language_of_a_text(text, code):
    assert language(text) == code


def test_words_and_sentences():
    assert words("don't 停 stop") == ["don", "t", "停", "stop"]
    assert count_sentences('He said "No." Then he left... e.g. home.\n- a point\n\n') == 4
    assert count_sentences("......") == 0


RECORD = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "at least", "keywords": None}],
}


@pytest.mark.parametrize(
    "answer, options, value",
    [
        ("one two three", {}, 1),
        ("one, two three", {}, 0),
        ("one, two three", {"count": "share"}, 0.5),
        ("", {"count": "share"}, 0),
        ("Sure, here it is:\none two three", {}, 0),
        ("Sure, here it is:\none two three", {"loose": True}, 1),
    ],
)
def test_the_score_of_an_answer(answer, options, value):
    assert scorer(**options).score(answer, RECORD).value == value
    assert scorer(**options).score(answer, {**RECORD, "kwargs": json.dumps(RECORD["kwargs"])}).value == value


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"instruction_id_list": []}, "not a list of instructions"),
        ({"instruction_id_list": ["no:such"]}, "'no:such' is not known"),
        ({"instruction_id_list": ["keywords:existence"]}, "missing a required argument: 'keywords'"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "cat"}]}, "no list of texts"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"marks": 1}]}, "unexpected keyword"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "no list of 1 mappings"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": "{"}, "no JSON"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "about"}],
            },
            "'about' is none of",
        ),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]}, "'xx' is not known"),
    ],
)
def test_a_record_that_makes_no_sense_leaves_the_answer_unscored(fields, reason):
    score = scorer().score("a b c", fields)
    assert score.value is None and reason in score.reason


def test_a_mistake_in_the_options():
    with pytest.raises(UserError, match="count is 'some'; it must be one of all, share"):
        scorer(count="some")


KWARGS = {
    "keywords:existence": {"keywords": ["zebra"]},
    "keywords:frequency": {"keyword": "zebra", "frequency": 1, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["zebra"]},
    "keywords:letter_frequency": {"letter": "z", "let_frequency": 1, "let_relation": "at least"},
    "language:response_language": {"language": "en"},
    "length_constraints:number_sentences": {"num_sentences": 2, "relation": "at least"},
    "length_constraints:number_words": {"num_words": 2, "relation": "at least"},
    "length_constraints:number_characters": {"num_characters": 2, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"},
    "detectable_content:number_placeholders": {"num_placeholders": 1},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 1},
    "detectable_format:numbered_list": {"num_items": 1},
    "detectable_format:number_highlighted_sections": {"num_highlights": 1},
    "detectable_format:multiple_sections": {"section_spliter": "第", "num_sections": 1},
    "combination:repeat_prompt": {"prompt_to_repeat": "a"},
    "startend:start_checker": {"start_phrase": "a"},
    "startend:end_checker": {"end_phrase": "a"},
    "change_case:capital_word_frequency": {"capital_frequency": 1, "capital_relation": "at least"},
    "punctuation:no_marks": {"marks": "!"},
}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_hostile_texts_take_no_time(name):
    """A quarter of a megabyte of what makes careless expressions slow."""
    for piece in (
        "[",
        "*",
        "<<",
        "- ",
        "\n",
        " ",
        "a",
        ".",
        "第",
        "1. ",
        "Mr. ",
        ". ",
        "p.",
        "******",
        '{"a":',
        "【",
        "\ud800",
        "》",
    ):
        text = piece * ((1 << 18) // len(piece))
        for hostile in (text, text + "z"):
            begun = time.monotonic()
            follows(hostile, name, KWARGS.get(name, {}))
            assert time.monotonic() - begun < 3, piece
