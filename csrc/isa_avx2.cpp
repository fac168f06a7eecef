#define ISA avx2
#define ISA_NAME "avx2"
#include "isa.h"
