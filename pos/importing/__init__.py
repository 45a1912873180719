"""A chain's history, from files: what is in them, what a map says it means, what becomes a sale, and what does not.

`reading` opens a file, `forms` finds out how it writes numbers and dates, `maps` has what its owner says, `books` makes
sales, `sending` sends them, `command` is `retail-pos import`. Nothing is left out silently: whatever does not become
a sale is counted, with its reason and its amount, and the sums have to balance.
"""
