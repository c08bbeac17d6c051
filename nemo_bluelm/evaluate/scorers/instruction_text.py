"""What instructions about a text speak of: its words, sentences, language; of Chinese and of spaced scripts."""

import re
from collections import Counter
from typing import Optional

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_KANA = "\u3040-\u30ff"
_WORD = re.compile(rf"[{_HAN}{_KANA}]|[^\W{_HAN}{_KANA}]+")
# A sentence ends at these marks, with quotes and brackets that close there; at a full stop only before a space.
_SENTENCE_END = re.compile(r"(?:[。！？…]+|(?<![.!?])[.!?]+(?=[\"'”’)\]]{0,4}(?:\s|\Z)))[\"'”’)\]」』）]{0,4}")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|etc|e\.g|i\.e|[A-Z])\.)\Z")
_LETTER_OR_DIGIT = re.compile(r"\w")
_ENOUGH = 20_000  # characters that tell a text's language

_SCRIPTS = {
    "han": _HAN,
    "kana": _KANA,
    "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "cyrillic": "\u0400-\u04ff",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "devanagari": "\u0900-\u097f",
    "bengali": "\u0980-\u09ff",
    "gurmukhi": "\u0a00-\u0a7f",
    "gujarati": "\u0a80-\u0aff",
    "tamil": "\u0b80-\u0bff",
    "telugu": "\u0c00-\u0c7f",
    "kannada": "\u0c80-\u0cff",
    "malayalam": "\u0d00-\u0d7f",
    "thai": "\u0e00-\u0e7f",
    "greek": "\u0370-\u03ff",
    "hebrew": "\u0590-\u05ff",
}
_LETTERS = {name: re.compile(f"[{span}]") for name, span in _SCRIPTS.items()}
_DENSE = {"han": 3, "kana": 2}  # letters of another script that say as much as one of these
# Frequent words of the languages that share a script.
_FREQUENT = {
    "latin": {
        "en": "the of and to in is that it for was with as on are this be at by you not have from or an which",
        "de": "der die und das ist nicht ein eine zu den mit von auf für im dem es sich auch als an werden sind wird",
        "fr": "le la les de des et est un une du en que qui dans pour pas sur au avec ce il elle nous vous sont",
        "es": "el la los las de y que en un una es por con para no se del lo como más su al pero está",
        "it": "il lo la gli le di e che è un una per non con del della sono in si da come più ma anche nel",
        "pt": "o a os as de e que em um uma é por com para não se do da no na como mais mas são dos",
        "nl": "de het een en van is dat niet in op te zijn voor met aan ook er maar als naar wordt worden",
        "vi": "và của là có không được cho một những trong với các này người để đã khi từ tôi rất",
        "sw": "na ya wa kwa ni katika za la cha kuwa hii yake watu hiyo kama lakini sana au pia",
        "fi": "ja on ei se että oli mutta myös ovat hän niin kuin joka tämä sekä voi ole kun tai",
        "id": "dan yang di dengan untuk dari tidak ini itu adalah pada ke dalam akan juga atau saya",
        "pl": "i w na z nie się to jest że do jak ale po co są przez dla od przy jego był",
        "tr": "ve bir bu da de için ile çok olarak daha var ama olan gibi ne kadar sonra değil",
        "sv": "och i att det som en på är av för med den till inte har om ett men var jag",
    },
    "cyrillic": {
        "ru": "и в не на что я с он как это по но из у за от так все её его для было мы ы э",
        "bg": "и на да се в от за е са с по не че като това ще при който които със съм ъ",
        "uk": "і в не на що з як це та але до я він за у від ми було для є ї",
    },
    "arabic": {
        "ar": "في من على أن إلى هذا التي ما مع كان هو عن لا هذه الذي ذلك",
        "fa": "که از این است را با در به برای آن می های یک خود ما شما",
        "ur": "ہے کے کی میں اور سے کو کا نے پر یہ ہیں کہ ایک بھی نہیں",
    },
    "devanagari": {
        "hi": "है के में की और से का को पर हैं ने यह कि एक भी नहीं हो",
        "mr": "आहे आणि या च्या मध्ये हे आहेत तो ते एक नाही होते की मी त्या",
        "ne": "छ र को मा ले हो गर्न यो छन् पनि तर भने हुन्छ लाई एक म",
    },
}
_FREQUENT_WORDS = {script: {code: set(words.split()) for code, words in of.items()} for script, of in _FREQUENT.items()}
_ALONE = {
    **{"kana": "ja", "hangul": "ko", "bengali": "bn", "gurmukhi": "pa", "gujarati": "gu", "tamil": "ta"},
    **{"telugu": "te", "kannada": "kn", "malayalam": "ml", "thai": "th", "greek": "el", "hebrew": "he", "han": "zh"},
}
_SIMPLIFIED = "们这国说时来对个学会发经过还没开关现为样长问见车东马门书话语让觉记谁难"
_TRADITIONAL = "們這國說時來對個學會發經過還沒開關現為樣長問見車東馬門書話語讓覺記誰難"
_CHINESE = ("zh", "zh-cn", "zh-tw")
LANGUAGES = frozenset([*_CHINESE, *_ALONE.values(), *(code for of in _FREQUENT.values() for code in of)])


def words(text: str) -> list[str]:
    """Its words; each Chinese or Japanese character is one, as editors count."""
    return _WORD.findall(text)


def count_sentences(text: str) -> int:
    """Of English and Chinese punctuation, and of lines that end without any."""
    count = 0
    for line in text.splitlines():
        begin = 0
        for end in _SENTENCE_END.finditer(line):
            stop = end.end()
            if stop < len(line) and _ABBREVIATION.search(line[max(begin, stop - 8) : stop]):
                continue
            count += _LETTER_OR_DIGIT.search(line, begin, stop) is not None
            begin = stop
        count += _LETTER_OR_DIGIT.search(line, begin) is not None
    return count


def language(text: str) -> Optional[str]:
    """The language that most of a text is in, as ISO 639-1 has it (zh-cn, zh-tw for Chinese); None: nobody can tell."""
    text = text[:_ENOUGH]
    letters = Counter({name: len(kind.findall(text)) * _DENSE.get(name, 1) for name, kind in _LETTERS.items()})
    if letters["kana"] * 10 > letters["han"]:
        letters["kana"] += letters.pop("han")
    script, count = letters.most_common(1)[0]
    if not count:
        return None
    if script == "han":
        plain = [mark for mark in _SIMPLIFIED if mark not in _TRADITIONAL]
        full = [mark for mark in _TRADITIONAL if mark not in _SIMPLIFIED]
        return "zh-tw" if sum(map(text.count, full)) > sum(map(text.count, plain)) else "zh-cn"
    if script in _ALONE:
        return _ALONE[script]
    said = Counter(re.findall(r"[^\s\d.,;:!?\"'()،؟।|]+", text.lower()))
    votes = {code: sum(said[word] for word in of) for code, of in _FREQUENT_WORDS[script].items()}
    code = max(votes, key=votes.__getitem__)
    return code if votes[code] else None


def is_language(text: str, code: str) -> bool:
    """Whether a text is in the language of a code of ``LANGUAGES``."""
    found = language(text)
    return found in _CHINESE if code == "zh" else found == code


def is_latin(text: str) -> bool:
    """Whether its letters are Latin ones, most of them."""
    letters = {name: len(kind.findall(text)) for name, kind in _LETTERS.items()}
    return letters["latin"] * 2 > sum(letters.values())
