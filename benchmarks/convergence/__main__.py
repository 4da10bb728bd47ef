from benchmarks.convergence.run import main

raise SystemExit(main())
