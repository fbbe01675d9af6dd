// What the kernels for 8-lane subgroups share.

// bx, by, bz and bw: the first to the fourth values of v in four lanes from `lane` on, for every lane.
//#macro columns v lane
                    let r0 = subgroupBroadcast(${v}, ${lane});
                    let r1 = subgroupBroadcast(${v}, ${lane} + 1u);
                    let r2 = subgroupBroadcast(${v}, ${lane} + 2u);
                    let r3 = subgroupBroadcast(${v}, ${lane} + 3u);
                    let bx = vec4(r0.x, r1.x, r2.x, r3.x);
                    let by = vec4(r0.y, r1.y, r2.y, r3.y);
                    let bz = vec4(r0.z, r1.z, r2.z, r3.z);
                    let bw = vec4(r0.w, r1.w, r2.w, r3.w);
//#endmacro
