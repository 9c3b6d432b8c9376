from quikjax.cli import main

main()
