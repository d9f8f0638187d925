"""``python -m pomona_cli``, which is also what ``accelerate launch`` runs."""

from pomona_cli.main import main

if __name__ == "__main__":
    main()
