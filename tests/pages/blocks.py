"""The code of a Markdown page, run in order: Python in one namespace, `fastlora` commands in this process.

sybil finds the blocks, and knows these comments of a page, which readers do not see:

    <!-- skip: next "why this block cannot run here" -->
    <!-- invisible-code-block: python
    what the block below needs and a reader has
    -->
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import SkipTest

from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

RUN = ("python", "sh", "yaml")  # what is run or written; every other language is shown alone
FENCE = re.compile(r"^```(.*)$", re.MULTILINE)


@dataclass
class Shell:
    """Runs the `sh` blocks of a page.

    Args:
        main: the command, as `fastlora.cli.main`.
        train_options: put behind every `fastlora train` that trains; they have the last word.
        words: what stands for words that a reader replaces, such as RUN.
    """

    main: Callable[[Sequence[str]], int]
    train_options: Sequence[str] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, example: Example) -> None:
        for line in example.parsed.replace("\\\n", " ").splitlines():
            words = [found for word in shlex.split(line, comments=True) for found in self._expanded(word)]
            if words:
                self._run(line, words)

    def _expanded(self, word: str) -> list[str]:
        first, slash, rest = word.partition("/")
        word = self.words.get(first, first) + slash + rest
        return sorted(glob.glob(word)) or [word]

    def _run(self, line: str, words: list[str]) -> None:
        program, *arguments = words
        assert program == "fastlora", f"`{line}` is no fastlora command; it needs a comment that says why it is not run"
        if arguments[0] == "train" and "zero_shot" not in arguments:  # which has no iterations
            arguments += self.train_options
        code = self.main(arguments)
        assert code == 0, f"`{line}` ended with exit code {code}"


def write_yaml(example: Example) -> None:
    """A file as a page shows it; its name is the comment in its first line."""
    name = re.match(r"# (\S+\.yaml)\n", example.parsed)
    assert name, f"line {example.line}: the first line of YAML names its file, such as `# run.yaml`"
    Path(name[1]).write_text(example.parsed)


def run_page(path: Path, shell: Shell, **names: object) -> list[str]:
    """Run every block of a page in the working directory; the reasons of those that are not run."""
    document = _document(path, shell)
    document.namespace.update(names, shell=shell)
    skipped = []
    for example in document:
        try:
            example.evaluate()
        except SkipTest as reason:
            skipped.append(str(reason))
    return skipped


def _document(path: Path, shell: Shell) -> Document:
    languages = {"sh": shell, "yaml": write_yaml}
    parsers = [CodeBlockParser(language, evaluator) for language, evaluator in languages.items()]
    return Document.parse(str(path), PythonCodeBlockParser(), SkipParser(), *parsers)


def languages(path: Path) -> list[str]:
    """Of every fenced block of a page, "" where it has none."""
    return FENCE.findall(path.read_text())[::2]
