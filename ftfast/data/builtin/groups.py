"""Unicode groups of the drawings: which concepts are people, animals, food and so on.

The table follows the groups of Unicode's ``emoji-test.txt`` by first code point, written as ranges. Concepts that
can carry a skin tone are people by definition (the ``emoji`` package lists them), so they need no range here.
"""

from __future__ import annotations

TASKS = ("smileys", "animals", "food", "travel", "activities", "objects", "symbols", "flags")
"""The eight continual-learning tasks: every group outside people and body, in Unicode's order."""

TASK_ORDERS: dict[str, tuple[str, ...]] = {
    "I": tuple(sorted(TASKS)),
    "II": ("symbols", "food", "flags", "travel", "smileys", "objects", "animals", "activities"),
}
"""Two fixed orders of the tasks: I is alphabetical, II is a fixed shuffle."""

SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
"""The five skin tone modifiers."""

_RANGES = {
    # Body parts, silhouettes and fantasy people that carry no skin tone.
    "people": (
        "1F440 1F441 1F444-1F445 1F463-1F465 1F46A 1F5E3 1F93A 1F9B0-1F9B4 1F9B7 1F9CC 1F9DE-1F9DF 1F9E0 "
        "1FAC0-1FAC2 1FAC6 1FAE6 26F7"
    ),
    "smileys": (
        "2620 2639-263A 2763-2764 1F479-1F47B 1F47D-1F480 1F48B-1F48C 1F493-1F49F 1F4A2 1F4A4-1F4A6 1F4A8-1F4A9 "
        "1F4AB-1F4AD 1F4AF 1F573 1F5A4 1F5E8 1F5EF 1F600-1F644 1F648-1F64A 1F90D-1F90E 1F910-1F917 1F920-1F92F "
        "1F970-1F976 1F978-1F97A 1F9D0 1F9E1 1FA75-1FA77 1FAE0-1FAE5 1FAE8-1FAE9"
    ),
    "animals": (
        "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F3F5 1F400-1F43F 1F490 1F4AE 1F54A 1F577-1F578 1F940 "
        "1F981-1F98F 1F992-1F99D 1F99F-1F9A9 1F9AB-1F9AE 1FAB0-1FAB4 1FAB6-1FABF 1FACE-1FACF"
    ),
    "food": (
        "2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F3FA 1F52A 1F942-1F944 1F950-1F96F 1F980 1F990-1F991 "
        "1F99E 1F9AA 1F9C0-1F9CB 1FAD0-1FADF"
    ),
    "travel": (
        "231A-231B 23F0-23F3 2600-2604 2614 2668 2693 26A1 26C4-26C5 26C8 26E9-26EA 26F0-26F2 26F4-26F5 26FA 26FD "
        "2708 2744 2B50 1F300-1F321 1F324-1F32C 1F3A0-1F3A2 1F3AA 1F3CD-1F3CE 1F3D4-1F3E6 1F3E8-1F3ED 1F3EF-1F3F0 "
        "1F488 1F492 1F4A7 1F4BA 1F525 1F54B-1F54D 1F550-1F567 1F570 1F5FA-1F5FE 1F680-1F6A8 1F6B2 1F6CE 1F6D1 "
        "1F6D5-1F6D6 1F6DD-1F6DF 1F6E2-1F6EC 1F6F0-1F6F6 1F6F8-1F6FC 1F9BC-1F9BD 1F9ED 1F9F1 1F9F3 1FA82 1FA90 "
        "1FAA8 1FAB5"
    ),
    "activities": (
        "265F-2660 2663 2665-2666 26BD-26BE 26F3 26F8 2728 1F004 1F0CF 1F380-1F381 1F383-1F38B 1F38D-1F391 "
        "1F396-1F397 1F39F 1F3A3 1F3A8 1F3AB 1F3AD-1F3B4 1F3BD-1F3C0 1F3C5-1F3C6 1F3C8-1F3C9 1F3CF-1F3D3 1F3F8 "
        "1F52B 1F52E 1F579 1F5BC 1F6F7 1F93F 1F945 1F947-1F94F 1F9E7-1F9E9 1F9F5-1F9F6 1F9F8 1FA80-1FA81 "
        "1FA84-1FA86 1FAA1-1FAA2 1FAA9"
    ),
    "flags": "1F1E6-1F1FF 1F38C 1F3C1 1F3F3-1F3F4 1F6A9",
    "symbols": (
        "1F170-1F19A 1F201-1F251 1F3A6 1F3E7 1F4A0 1F4B1-1F4B2 1F4DB 1F4F3-1F4F6 1F500-1F506 1F518-1F524 "
        "1F52F-1F53D 1F549 1F54E 1F6AB 1F6AD-1F6B1 1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0 1F6DC 1F7E0-1F7F0 "
        "1FAAF"
    ),
    # The rest of the pictographs; below U+1F000 only these are objects, all others are symbols.
    "objects": ("2328 260E 2692 2694 2696-2697 2699 26B0-26B1 26CF 26D1 26D3 2702 2709 270F 2712"),
}
_PICTOGRAPHS_START = 0x1F000


def _expand(ranges: str) -> set[int]:
    points: set[int] = set()
    for item in ranges.split():
        low, _, high = item.partition("-")
        points.update(range(int(low, 16), int(high or low, 16) + 1))
    return points


_GROUP_OF_POINT = {point: group for group, ranges in _RANGES.items() for point in _expand(ranges)}


def group_of(key: tuple[int, ...], modifier_bases: frozenset[int]) -> str:
    """Name the group of a concept.

    Args:
        key: Code points of the concept, without U+FE0F and skin tones.
        modifier_bases: Code points that can carry a skin tone.

    Returns:
        "people" or one of ``TASKS``.
    """
    if not modifier_bases.isdisjoint(key):
        return "people"
    if key == (0x1F441, 0x200D, 0x1F5E8):  # the eye in a speech bubble is an emotion, the eye alone a body part
        return "smileys"
    if key[-1] == 0x20E3:  # keycaps
        return "symbols"
    default = "objects" if key[0] >= _PICTOGRAPHS_START else "symbols"
    return _GROUP_OF_POINT.get(key[0], default)
