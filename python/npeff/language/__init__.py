"""Language models: positions in texts as examples."""

from npeff.language.places import Place, Places

__all__ = ["Place", "Places"]
