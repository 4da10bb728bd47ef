"""Runs as their sources describe them: settings of ``ds-optim train`` with what the source says of them and what not.

A recipe is a JSON (``configs/recipes/``). ``train`` is all that the run is told; ``unsaid`` names the settings of it
that the source leaves open, each with what stands there instead; ``differs`` says what cannot be as in the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds_optim.errors import UserError, did_you_mean
from ds_optim.job.settings import make_settings
from ds_optim.zero.complaints import reword
from ds_optim.zero.reading import read_json

FOLDER = Path(__file__).parents[2] / "configs" / "recipes"
"""Of a checkout; an installed wheel has no configs, and takes paths alone."""


class Recipe(BaseModel):
    """One published run. ``tokens_per_step`` is the source's; ``ranks`` are those that ``train`` is written for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    says: str
    doubts: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    ranks: int = Field(ge=1)
    tokens_per_step: int = Field(ge=1)
    unsaid: dict[str, str]
    train: dict[str, Any]

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        settings = make_settings(**self.train)
        tokens = settings.micro_batch * settings.accumulation * settings.seq_len * self.ranks
        if tokens != self.tokens_per_step:
            raise ValueError(
                f"train takes {tokens:,} tokens a step on {self.ranks} ranks, not {self.tokens_per_step:,}"
            )
        for name in self.unsaid:
            if name.split(".")[0] not in type(settings).model_fields:
                raise ValueError(f"unsaid names {name!r}, which is no setting of a run")
        return self

    def settings_for(self, flags: dict[str, Any], ranks: int) -> dict[str, Any]:
        """What ``train`` is given: the recipe's settings under the flags, which win, on so many ranks.

        Raises:
            UserError: the source's batch cannot be shared out so.
        """
        taken = {"preset", "model"} if flags.keys() & {"preset", "model"} else set()
        taken |= {"optimizer_params"} if "optimizer" in flags else set()
        taken |= {"warmup"} if "steps" in flags else set()
        given = {name: value for name, value in self.train.items() if name not in taken} | flags
        if "accumulation" in flags:
            return given
        settings = make_settings(**given)
        at_once = settings.micro_batch * settings.seq_len * ranks
        if self.tokens_per_step % at_once:
            raise UserError(
                f"{self.tokens_per_step:,} tokens a step are no whole number of micro-batches: {settings.micro_batch} "
                f"sequences of {settings.seq_len} on {ranks} ranks are {at_once:,}; change --micro-batch, or say "
                "--accumulation"
            )
        return {**given, "accumulation": self.tokens_per_step // at_once}


def load_recipe(name: str) -> Recipe:
    """A recipe by its name in ``configs/recipes`` or by its path; a path in it is seen from its own folder.

    Raises:
        UserError: there is none, or it does not hold together.
    """
    named = FOLDER / f"{name}.json"
    path = named if named.is_file() else Path(name).expanduser()
    if not path.is_file():
        known = sorted(file.stem for file in FOLDER.glob("*.json"))
        there = f"; there are {', '.join(known)}" if known else " (an installed package has none of its own)"
        raise UserError(f"there is no recipe {name!r}{did_you_mean(name, known)}: write a name or a path{there}")
    content = read_json(path)
    train = content.get("train") if isinstance(content, dict) else None
    if isinstance(train, dict) and isinstance(train.get("model"), str) and (path.parent / train["model"]).is_file():
        content = {**content, "train": {**train, "model": str(path.parent / train["model"])}}
    try:
        return Recipe.model_validate(content)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path.name}: {reword(error, Recipe)}") from None
