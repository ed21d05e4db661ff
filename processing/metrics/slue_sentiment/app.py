"""The Space's page: a form for the metric, and its card."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("slue_sentiment.py"))))
