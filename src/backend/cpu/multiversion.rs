//! Compiling plain loops for the widest vectors that the processor has, chosen at run time.

/// Which instruction set loops are run with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// What every processor of the target has.
    Base,
    /// 8 lanes.
    Avx2,
    /// 16 lanes.
    Avx512,
}

/// The widest set that this processor has.
#[inline]
pub fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
        {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Level::Avx2;
        }
    }
    Level::Base
}

/// Defines a function whose loops are compiled for each [`Level`] and run at the widest one present. What the body
/// calls must be `#[inline(always)]` to be compiled along. Const generics are written `<const A: bool>`; parameters are
/// plain names. Results do not depend on the level unless the body says `mul_add`: nothing is contracted or reordered.
#[macro_export]
macro_rules! multiversion {
    ($(#[$m:meta])* $v:vis fn $name:ident $(<$(const $g:ident: $gt:ty),+>)? ($($a:ident: $t:ty),* $(,)?)
        $(-> $r:ty)? $body:block) => {
        $(#[$m])*
        #[allow(clippy::too_many_arguments)]
        $v fn $name $(<$(const $g: $gt),+>)? ($($a: $t),*) $(-> $r)? {
            #[inline(always)]
            fn body $(<$(const $g: $gt),+>)? ($($a: $t),*) $(-> $r)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
                fn avx512 $(<$(const $g: $gt),+>)? ($($a: $t),*) $(-> $r)? {
                    body $(::<$($g),+>)? ($($a),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$(const $g: $gt),+>)? ($($a: $t),*) $(-> $r)? {
                    body $(::<$($g),+>)? ($($a),*)
                }
                match $crate::backend::cpu::multiversion::level() {
                    // SAFETY: `level` saw that the processor has these instructions.
                    $crate::backend::cpu::multiversion::Level::Avx512 => {
                        return unsafe { avx512 $(::<$($g),+>)? ($($a),*) };
                    }
                    // SAFETY: as above.
                    $crate::backend::cpu::multiversion::Level::Avx2 => {
                        return unsafe { avx2 $(::<$($g),+>)? ($($a),*) };
                    }
                    $crate::backend::cpu::multiversion::Level::Base => {}
                }
            }
            body $(::<$($g),+>)? ($($a),*)
        }
    };
}
