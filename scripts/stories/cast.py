"""Who is in a story, and where: the bindings that keep names, pronouns and places consistent."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from stories.grammar import Binding, Rules

PRONOUNS = {
    "woman": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "man": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}
PREPOSITIONS = {
    "beach": "on",
    "farm": "on",
    "hill": "on",
    "mountain": "on",
    "island": "on",
    "river": "by",
    "lake": "by",
    "market": "at",
}


@dataclass(frozen=True)
class Cast:
    hero: str
    hero_kind: str
    hero_gender: str
    friend: str
    friend_kind: str
    elder: str
    elder_gender: str
    place: str
    season: str

    @property
    def friend_gender(self) -> str:
        """The friend is of the other gender, so that "he" and "she" say who is meant."""
        return "man" if self.hero_gender == "woman" else "woman"


def draw_cast(rules: Rules, rng: random.Random) -> Cast:
    gender, elder_gender = rng.choice(["woman", "man"]), rng.choice(["woman", "man"])
    if rng.random() < 0.5:
        own, other = ("girl", "boy") if gender == "woman" else ("boy", "girl")
        names, kinds, elders = (
            (rng.choice(rules[f"{own}.name"]), rng.choice(rules[f"{other}.name"])),
            [own, other],
            "child",
        )
    else:
        first, second = rng.sample(rules["animal.name"], 2)
        names, kinds, elders = (first, second), rng.sample(rules["animal.kind"], 2), "animal"
    return Cast(
        hero=names[0],
        hero_kind=kinds[0],
        hero_gender=gender,
        friend=names[1],
        friend_kind=kinds[1],
        elder=rng.choice(rules[f"elder.{elders}.{elder_gender}"]),
        elder_gender=elder_gender,
        place=rng.choice(rules["place"]),
        season=rng.choice(rules["season"]),
    )


def bindings(cast: Cast, rules: Rules, rng: random.Random, first_person: bool = False) -> Mapping[str, Binding]:
    """`{h}` and `{he}` are the hero, `{f}` the friend, `{e}` the elder, `{p}` the place.

    The friend is introduced ("his friend Bramble the fox") wherever the story first mentions the friend.
    """
    human = cast.hero_kind in ("girl", "boy")
    home = rng.choice(rules["house"] if human else rules[f"{cast.hero_kind}.home"])
    his = "my" if first_person else PRONOUNS[cast.hero_gender]["his"]
    introduction = f"{his} {rng.choice(rules['pal'])} {cast.friend}" + ("" if human else f" the {cast.friend_kind}")
    mentions: list[str] = []

    def friend() -> str:
        mentions.append(cast.friend)
        return introduction if len(mentions) == 1 else cast.friend

    def stranger_first() -> str:
        mentions.append(cast.friend)
        return f"a {cast.friend_kind}"

    bound: dict[str, Binding] = {"h": cast.hero, "kind": cast.hero_kind, "home": home, "season": cast.season}
    if not first_person:  # a letter that says "his" of its writer is a mistake: let it fail
        bound |= PRONOUNS[cast.hero_gender]
    bound |= {"f": friend, "f.intro": friend, "f.kind.a": stranger_first}
    bound |= {f"f.{key}": value for key, value in PRONOUNS[cast.friend_gender].items()}
    bound |= {"e": cast.elder} | {f"e.{key}": value for key, value in PRONOUNS[cast.elder_gender].items()}
    where = PREPOSITIONS.get(cast.place, "in")
    the = f"the {cast.place}"
    return bound | {"p": cast.place, "p.the": the, "p.in": f"{where} {the}", "p.to": f"to {the}"}
