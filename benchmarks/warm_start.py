"""
`python -m benchmarks.warm_start --dataset DIR`: how well the warm start knows words in clips that it has not seen, by
encoder, number of clips and ridge penalty. No training: minutes.

Each audio token of held-out clips is mapped into the language model's embedding space. "Top 1" is how often the token
that is being said is the nearest of the whole vocabulary there, "top 10" how often it is among the nearest ten.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor
from processing.backbones import resolve_backbone
from processing.datasets import load_corpus
from processing.questions import spread
from processing.report import markdown_table
from processing.warm_start import RidgeRegression, WordAligner, speech_and_tokens

from .measure import machine
from .report import write_results


def hear(source: str, llm: str, rows: list) -> tuple[list[list], torch.Tensor]:
    """For each set of rows, what is heard in each clip; and the language model's embeddings."""
    audio, text = resolve_backbone(source), resolve_backbone(llm)
    model = SenseForConditionalGeneration.from_backbones(audio, text, dtype=torch.float32).eval()
    processor = SenseProcessor.from_backbones(audio, text)
    aligner = WordAligner.from_pretrained(audio, "cpu")
    bars = [tqdm(part, desc=f"{source}, {name}", unit="clip") for name, part in zip(("known", "held out"), rows)]
    found = [[speech_and_tokens(model, processor, aligner, row) for row in bar] for bar in bars]
    return [
        [clip for clip in part if clip is not None] for part in found
    ], model.get_input_embeddings().weight.detach()


def ranks(regressed: torch.Tensor, tokens: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """How many of the vocabulary are nearer than the true token, by the cosine about their mean: `(rows,)`."""
    mean = embeddings.mean(0)
    cosines = torch.nn.functional.normalize(regressed - mean, dim=1)
    cosines = cosines @ torch.nn.functional.normalize(embeddings - mean, dim=1).T
    return (cosines > cosines.gather(1, tokens[:, None])).sum(1)


@torch.inference_mode()
def measure(known: list, held_out: list, embeddings: torch.Tensor, ridge: float) -> dict:
    regression = RidgeRegression(known[0][0].shape[1], embeddings.shape[1])
    for speech, tokens in known:
        regression.add(speech, embeddings[tokens])
    weight, bias, r2 = regression.solve(ridge)
    found = [ranks(speech @ weight.float().T + bias.float(), tokens, embeddings) for speech, tokens in held_out]
    nearer = torch.cat(found)
    share = {f"top{n}": 100 * float((nearer < n).float().mean()) for n in (1, 10)}
    return {"clips": len(known), "ridge": ridge, "r2": r2, **share}


def page(results: dict) -> str:
    header = ["encoder", "clips", "ridge", "R2 on them", "top 1, held out", "top 10"]
    rows = []
    for one in results["found"]:
        numbers = f"{one['ridge']:g}", f"{one['r2']:.3f}", f"{one['top1']:.1f}", f"{one['top10']:.1f}"
        rows.append([one["encoder"], str(one["clips"]), *numbers])
    return f"{markdown_table(header, rows)}\n\n{results['about']}\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--encoders", nargs="+", default=["whisper-tiny.en", "whisper-base"])
    parser.add_argument("--llm", default="SmolLM2-135M-Instruct")
    parser.add_argument("--clips", nargs="+", type=int, default=[60, 120, 240], help="of the training split")
    parser.add_argument("--ridge", nargs="+", type=float, default=[1e-3, 1e-2])
    parser.add_argument("--held_out", type=int, default=60, help="clips of the dev split")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    args = parser.parse_args(argv)
    rows = [
        spread(load_corpus(args.dataset, split, text_column=args.text_column), number)
        for split, number in (("train", max(args.clips)), ("dev", args.held_out))
    ]
    found = []
    for encoder in args.encoders:
        (known, held_out), embeddings = hear(encoder, args.llm, rows)
        for clips in args.clips:
            number = min(clips, len(known))
            chosen = [known[i * len(known) // number] for i in range(number)]
            found += [{"encoder": encoder, **measure(chosen, held_out, embeddings, ridge)} for ridge in args.ridge]
    where = args.dataset.rstrip("/").rpartition("/")[2]
    tokens = sum(len(tokens) for _, tokens in held_out)
    about = f"{args.llm}; {tokens:,} audio tokens of {len(held_out)} clips of {where}'s dev split; per cent."
    results = {"found": found, "about": about, "machine": machine("cpu")}
    write_results(args.out, "warm_start", results, page(results))
    return results


if __name__ == "__main__":
    main()
