#define ISA avx512bf16
#define ISA_NAME "avx512bf16"
#include "isa.h"
