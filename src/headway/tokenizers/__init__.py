"""Text to token ids and back, from a Hugging Face directory or a GGUF file. Knows neither torch nor transformers."""

from headway.tokenizers.load import load_tokenizer
from headway.tokenizers.tokenizer import Tokenizer, TokenStream

__all__ = ["TokenStream", "Tokenizer", "load_tokenizer"]
