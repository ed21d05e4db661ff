"""Docstrings in transformers' manner, made ready for mkdocstrings (see mkdocs.yml)."""

import re

import griffe


# [`SenseModel`], [`~SenseForConditionalGeneration.quantize`]: the tilde shows the last part alone.
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
# frames (`torch.Tensor` of shape `(batch, frames)`, *optional*): a type is shown as code, marks and all.
TYPED = re.compile(r"^(\s+\w+ \()(.*?)(\):)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Turns references into links where the name is ours, and takes Markdown's marks out of types."""

    def on_object(self, *, obj: griffe.Object, **kwargs):
        if obj.docstring:
            text = TYPED.sub(lambda found: found[1] + re.sub(r"[`*]", "", found[2]) + found[3], obj.docstring.value)
            obj.docstring.value = REFERENCE.sub(link, text)


def link(found: re.Match) -> str:
    """Markdown of a reference: a link to our own classes, the bare name of transformers'."""
    short, name = found.groups()
    shown = f"`{name.rpartition('.')[2] if short else name}`"
    return f"[{shown}][modeling_sense.{name}]" if name.startswith("Sense") else shown
