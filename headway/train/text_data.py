"""The data of a pre-training run: tokenised text, in batches and as validation windows."""

from dataclasses import asdict, dataclass
from typing import Any

from headway.config import Config
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import Tokenizer
from headway.data.validation import ValidationText, validation_text
from headway.eval.bits_per_byte import Evaluation, evaluate
from headway.model.transformer import Transformer
from headway.parallel.mesh import Mesh
from headway.parallel.parallelize import Parallelism
from headway.train.records import Log


@dataclass(frozen=True)
class TextData:
    """A `TrainingData` of tokenised text."""

    stream: Stream
    validation: ValidationText

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of the tokens and of the validation text."""
        return {
            "data": self.stream.dataset.fingerprint,
            "validation text": self.validation.fingerprint,
        }

    @property
    def info(self) -> dict[str, Any]:
        """The validation text, the overlap with it, and sources with approximate byte counts."""
        dataset = self.stream.dataset
        return {
            "validation": asdict(self.validation),
            "overlap": {**asdict(dataset.overlap), "sentence": dataset.overlap.sentence},
            "approximate": dataset.approximate,
        }

    @property
    def notes(self) -> list[str]:
        """The validation text, and notes on the sources."""
        notes = (f"note: {note}" for note in self.stream.dataset.notes)
        return [f"validation: {self.validation.sentence}", *notes]

    def evaluate(self, model: Transformer, parallelism: Parallelism) -> Evaluation:
        """Return the loss on the validation windows, always the same ones. Collective."""
        micro_batch_size = self.stream.config.micro_batch_size
        return evaluate(model, self.stream, self.validation.windows, micro_batch_size, parallelism)


def load_text(config: Config, tokenizer: Tokenizer, mesh: Mesh, log: Log) -> TextData:
    """Tokenise the sources of a config, or read them from the cache: one rank per host first.

    Raises `UsageError` for sources that cannot be read or are too short, and where ranks have other
    data. Collective."""
    with mesh.one_per_host():
        stream = Stream(prepare(config.data, tokenizer, log), config.data, config.run.seed)
    mesh.check_equal({"the fingerprint of the data": stream.dataset.fingerprint})
    return TextData(stream, validation_text(stream, config.run.eval_tokens))
