"""Samples: the endless, shuffled stream of epochs over a source, each sample as its tokens."""

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.shuffle import permute
from data.sources import TextSource


class TextSamples:
    """Sample v is document perm(v % N) of the source's N, with the permutation of epoch v // N; tokenised when read.

    Small to pickle: a worker process opens the source's files itself.
    """

    def __init__(self, source: TextSource, tokenizer: Tokenizer, end_of_document: int | None, seed: int | None) -> None:
        """`end_of_document`: the token to append to each document. `seed`: None for the documents' own order."""
        self._source, self._tokenizer, self._seed = source, tokenizer, seed
        self._ending = [] if end_of_document is None else [end_of_document]

    @property
    def num_documents(self) -> int:
        """N, the samples of an epoch."""
        return len(self._source)

    def read(self, sample: int) -> NDArray[np.int32]:
        """The tokens of a sample; none at all, not even the ending, for a text without any. Raises ValueError."""
        epoch, index = divmod(sample, self.num_documents)
        if self._seed is not None:
            index = permute(index, self.num_documents, self._seed, epoch)
        # The batch method because it alone leaves out the offsets into the text, a third of the time.
        (encoding,) = self._tokenizer.encode_batch_fast([self._source[index]], add_special_tokens=False)
        return np.array(encoding.ids + self._ending if encoding.ids else [], np.int32)


def load_tokenizer(folder: str) -> tuple[Tokenizer, int | None]:
    """A Hugging Face tokenizer as AutoTokenizer would use it, and its end-of-sequence token (None: it has none).

    Raises ValueError for a tokenizer that is not one of the `tokenizers` library.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import, and of no use to workers

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"data.tokenizer = {folder!r}: expected a tokenizer with a tokenizer.json")
    # Training needs neither offsets nor masks, and workers nothing of transformers: only what does the work.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend, tokenizer.eos_token_id
