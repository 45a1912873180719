"""The command `retail-pos`, or `python -m pos`."""

from chassis import cli
from pos.demo import Settings, demo

commands = cli.Commands("retail-pos", "The tills' side: a simulated chain.", {"demo": (Settings, "purchases")})
commands.add_command(demo)

main = commands.run

if __name__ == "__main__":
    main()
