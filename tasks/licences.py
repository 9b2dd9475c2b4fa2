"""Which data sets' licences are clear, as far as is known (METHODS 8). No legal advice: it decides what is asked."""

CLEAR = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "odc-by", "own")
# By a part of the hub id, for a tag on a set that was derived from one of these changes nothing about its texts.
UNCLEAR = {
    "openhermes": "OpenHermes: none declared, compiled from many sources, text by GPT-4",
    "clair": "CLAIR: no licence tag, text by GPT-4-turbo",
    "sharegpt": "ShareGPT: conversations of users, collected without their leave",
    "orca": "Orca sets: an open request asks for CC-BY-NC-4.0, text by GPT models",
}


def doubt_about(hub: str | None, licence: str | None) -> str:
    """What is not clear about the licence of a data set; empty: nothing.

    Args:
        hub: its id; None: files of the user's own.
        licence: SPDX id as the user states it, or "own".
    """
    known = next((told for part, told in UNCLEAR.items() if part in (hub or "").lower()), "")
    if known:
        return known
    if licence is None:
        return "no licence is stated"
    return "" if licence.lower() in CLEAR else f"{licence!r} is none of {', '.join(CLEAR)}"
