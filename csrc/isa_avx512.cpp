#define ISA avx512
#define ISA_NAME "avx512"
#include "isa.h"
