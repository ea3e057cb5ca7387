package steer

// Only this needs clang (14 is what the committed objects were made with) and the packages llvm and libbpf-dev.
//
//go:generate go tool bpf2go -go-package steer -target bpfel -cflags "-O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu" bpf bpf/steer.c
//go:generate go tool bpf2go -go-package steer -target bpfel -output-suffix _test -cflags "-O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu" test bpf/steer_test.c
//go:generate sh -c "cat bpf/steer.c bpf/steer_test.c | sha256sum | cut -d' ' -f1 >bpf/source.sha256"
