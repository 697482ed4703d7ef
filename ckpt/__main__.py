import sys

from ckpt.tool import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
