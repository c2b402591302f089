"""Put a measured table into performance.md: `python documentation/insert_table.py NAME FILE.md`.

FILE.md is what `python -m vim.benchmark --markdown` wrote, or any Markdown; it replaces what stands between
`<!-- table NAME -->` and `<!-- end NAME -->`.
"""

import argparse
import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("performance.md")


def insert(page: str, name: str, table: str) -> str:
    """The page with the table in the place of that name; ValueError, listing the places, if there is none."""
    pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(page):
        places = ", ".join(re.findall(r"<!-- table (.*?) -->", page))
        raise ValueError(f"there is no place for a table {name!r}; there are {places}")
    return pattern.sub(lambda match: f"{match[1]}\n{table.strip()}\n\n{match[2]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description="Put a measured table into performance.md.", allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="of the place: <!-- table NAME -->")
    parser.add_argument("table", metavar="FILE.md", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    try:
        text = insert(args.page.read_text(encoding="utf-8"), args.name, args.table.read_text(encoding="utf-8"))
        args.page.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"insert_table: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
