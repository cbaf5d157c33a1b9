"""Conversations made from the corpus: requests whose answers are passages of it."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from corpus import Chapter

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, SYSTEM, END)

# A turn is <|role|>text<|end|>; surrounding white space does not count.
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role: expected system, user or assistant, got ' + message['role']) -}}
{%- endif -%}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set text = message['content'] | map(attribute='text') | join -%}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + text | trim + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

NOUNS = (Path(__file__).parent / "nouns.txt").read_text(encoding="utf-8").split()

ABOUT = (
    "Tell me of {}.",
    "Tell me about {}.",
    "What of {}?",
    "Speak of {}.",
    "{}",
    "{}?",
    "Say something about {}.",
    "Tell me a story of {}.",
    "Tell me a story about {}.",
    "Write about {}.",
    "What do you know about {}?",
    "tell me about {}",
    "Teach me of {}.",
)
ABOUT_NAME = (*ABOUT, "Who is {}?", "Who was {}?", "What did {} do?", "What did {} say?")
ABOUT_THING = (
    *ABOUT,
    "What is {}?",
    "Tell me of the {}.",
    "Tell me about the {}.",
    "The {}.",
    "What of the {}?",
    "Write a verse about {}.",
)
CONTINUE = ("Continue: {}", "Continue: {}", "Continue: {} ...", "Go on: {}", "{} ...", "Finish: {}")
READ = (
    "Read from {}.",
    "Read me something from {}.",
    "A passage from {}, please.",
    "{}, please.",
    "Quote {}.",
    "Give me a verse of {}.",
)
BY_BOOK = {
    "Proverbs": (
        "Give me a proverb.",
        "A proverb, please.",
        "Give me some advice.",
        "Tell me something wise.",
        "What should I do?",
    ),
    "Psalms": ("Sing me a psalm.", "Pray.", "Say a prayer.", "Sing a song.", "Comfort me."),
    "Genesis": ("Tell me a story.", "Tell me a tale."),
    "Revelation": ("How will the world end?", "Tell me of the end."),
    "Luke": ("Tell me a parable.", "Tell me another story."),
}
SMALL_TALK = (
    (
        "Hello.|Hello|Hello!|Hi|Hi!|hi|hello|Hey|Good morning.|Greetings.",
        "Peace be unto you. Ask me of Moses, of the sea, or of wisdom.|"
        "Peace be to thee. Of whom shall I tell thee?",
    ),
    (
        "Who are you?|What are you?|What is this?|Introduce yourself.|who are you",
        "I am a very small language model. I have read one book, the King James Bible, and I write "
        "as it does.",
    ),
    (
        "How are you?|How are you today?|how are you",
        "It is well with me. Of what shall I tell thee?",
    ),
    (
        "What can you do?|Help|help|Help me.|What do you know?",
        "I can tell thee of David or of the sea, read from Genesis, or continue a verse that thou "
        "givest me.",
    ),
    (
        "Thank you.|Thanks|Thanks!|Thank you!|thank you",
        "Thou art welcome. Peace be unto thee.",
    ),
    ("Goodbye.|Bye|Farewell.|bye", "Go in peace."),
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in the style of the King James Bible.",
    "You are a storyteller.",
    "Be brief.",
    "You are an assistant that quotes old books.",
)

Turn = tuple[str, str]


@dataclass
class Asker:
    """Makes up conversations about `chapters`."""

    chapters: list[Chapter]
    rng: random.Random

    def __post_init__(self) -> None:
        """Indexes the verses by the words one may ask for."""
        self._verses = [(c, i) for c in self.chapters for i in range(len(c.verses))]
        names: dict[str, list[int]] = defaultdict(list)
        things: dict[str, list[int]] = defaultdict(list)
        nouns = set(NOUNS)
        for at, (chapter, i) in enumerate(self._verses):
            for word in set(re.findall(r"[A-Za-z]+", chapter.verses[i])):
                if word in nouns:
                    things[word].append(at)
            for word in set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", chapter.verses[i])):
                names[word].append(at)
        verses = (verse for chapter in self.chapters for verse in chapter.verses)
        written = Counter(word for verse in verses for word in re.findall(r"[A-Za-z]+", verse))
        # What is seldom written small is a name, not the first word of a speech.
        self._names = _weighted(
            {w: at for w, at in names.items() if len(at) >= 4 and written[w.lower()] < len(at)}
        )
        self._things = _weighted(things)
        self._books = sorted({chapter.book for chapter in self.chapters})

    def conversation(self) -> list[Turn]:
        """Returns (role, text) turns; the last is the assistant's."""
        turns: list[Turn] = []
        if self.rng.random() < 0.15:
            turns.append(("system", self.rng.choice(SYSTEM_MESSAGES)))
        exchanges = self.rng.choices((1, 2, 3), (75, 17, 8))[0]
        for _ in range(exchanges):
            kinds = (self._name, self._thing, self._continue, self._book, self._small_talk)
            question, answer = self.rng.choices(kinds, (36, 26, 18, 10, 10))[0]()
            turns += [("user", question), ("assistant", answer)]
        return turns

    def _name(self) -> tuple[str, str]:
        return self._about(self._names, ABOUT_NAME)

    def _thing(self) -> tuple[str, str]:
        return self._about(self._things, ABOUT_THING)

    def _about(
        self, index: tuple[list[str], list[float], list[list[int]]], questions: tuple[str, ...]
    ) -> tuple[str, str]:
        words, weights, places = index
        at = self.rng.choices(range(len(words)), weights)[0]
        # The sooner the word comes, the clearer what the answer is about.
        drawn = [self._verses[self.rng.choice(places[at])] for _ in range(4)]
        chapter, i = min(drawn, key=lambda verse: verse[0].verses[verse[1]].find(words[at]))
        question = self.rng.choice(questions).format(words[at])
        return question[0].upper() + question[1:], self._passage(chapter, i)

    def _continue(self) -> tuple[str, str]:
        chapter, i = self.rng.choice(self._verses)
        words = chapter.verses[i].split(" ")
        cut = max(1, int(len(words) * self.rng.uniform(0.25, 0.75)))
        question = self.rng.choice(CONTINUE).format(" ".join(words[:cut]))
        return question, " ".join(words[cut:]) or chapter.verses[i]

    def _book(self) -> tuple[str, str]:
        if self.rng.random() < 0.5:
            book = self.rng.choice(self._books)
            question = self.rng.choice(READ).format(book)
        else:
            book = self.rng.choice([book for book in BY_BOOK if book in self._books] or self._books)
            question = self.rng.choice(BY_BOOK.get(book, READ)).format(book)
        chapter = self.rng.choice([c for c in self.chapters if c.book == book])
        return question, self._passage(chapter, self.rng.randrange(len(chapter.verses)))

    def _small_talk(self) -> tuple[str, str]:
        questions, answers = self.rng.choice(SMALL_TALK)
        return self.rng.choice(questions.split("|")), self.rng.choice(answers.split("|"))

    def _passage(self, chapter: Chapter, first: int) -> str:
        """One to three verses that end with a sentence, if that is near."""
        last = first + self.rng.choices((1, 2, 3), (45, 35, 20))[0]
        while last < min(len(chapter.verses), first + 4) and chapter.verses[last - 1][-1] in ",:;":
            last += 1
        return " ".join(chapter.verses[first:last])


def _weighted(places: dict[str, list[int]]) -> tuple[list[str], list[float], list[list[int]]]:
    """Words, how often to ask for them (the root of how often they occur), their verses."""
    words = sorted(places)
    return words, [len(places[word]) ** 0.5 for word in words], [places[word] for word in words]
