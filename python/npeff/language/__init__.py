"""Language models: positions in texts as examples, and models by their Hugging Face path."""

from npeff.language.places import Place, Places

__all__ = ["Place", "Places"]
