"""Which draw of noise the rows of one group of parameters use."""


def group_layout(draws, inner, group_rows):
    """(draws, inner) inside a group: its row i uses draw first + (i // inner) % draws, see `first_draw`.

    `draws` and `inner` are those of all rows; None where groups and draws cut each other.
    """
    cycle = draws * inner
    if group_rows % cycle == 0:
        return draws, inner
    if cycle % group_rows == 0:
        if group_rows % inner == 0:
            return group_rows // inner, inner
        if inner % group_rows == 0:
            return 1, group_rows
    return None


def first_draw(group, draws, inner, group_rows):
    """The draw of a group's first row."""
    return group * group_rows // inner % draws
