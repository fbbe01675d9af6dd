use super::*;
use crate::ops::room;

fn rows(case: &str, passes: &[Pass], all_variants: bool) -> Result<Vec<KernelReport>> {
    let cpu = crate::backend::open("cpu")?;
    let options = KernelOptions {
        passes: passes.to_vec(),
        all_variants,
        hot: true,
        rivals: true,
        machine: None,
        limits: Limits {
            warm_up: 1,
            min_runs: 2,
            precision: 1.0,
            time: Duration::ZERO,
        },
    };
    let ceilings = Ceilings {
        flops: 1e15,
        bandwidth: vec![[1.0, 1e15]],
        launch: 0.0,
    };
    let (name, params) = case.split_once('(').unwrap();
    let params = params.trim_end_matches(')');
    let found = measure_case(cpu.as_ref(), room(name)?, params, &options, &ceilings, None)?;
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    Ok(found.rows)
}

#[test]
fn directions_and_variants() {
    let case = "conv2d(n=1,h=8,c=16,k=16,r=3,pad=1)";
    let r = rows(case, &[Pass::Forward, Pass::Wgrad], true).unwrap();
    let got: Vec<(&str, &str)> = r.iter().map(|r| (&*r.op, &*r.variant)).collect();
    for op in ["conv2d", "conv2d_wgrad"] {
        assert!(
            got.contains(&(op, "auto")) && got.contains(&(op, "implicit_gemm")),
            "{got:?}"
        );
    }
    assert!(!got.iter().any(|g| g.0 == "conv2d_dgrad"));
    assert!(got.contains(&("conv2d", "float64_sums")));
    assert!(!got.contains(&("conv2d_wgrad", "float64_sums")));
    assert!(
        r.iter()
            .all(|r| r.case == case && r.error <= 1.0 && r.roofline < 1.0)
    );
}

#[test]
fn rivals_have_rows_of_their_own() {
    let mut r = rows("linear(m=9,i=8,o=8)", &[], false).unwrap();
    let gemm = |r: &&KernelReport| r.rival && r.variant == "gemm";
    let ops: Vec<String> = r.iter().filter(gemm).map(|r| r.op.clone()).collect();
    for op in ["linear", "linear_dgrad", "linear_wgrad"] {
        assert!(ops.iter().any(|o| o == op), "{ops:?}");
    }
    assert!(r.iter().any(|r| !r.rival && r.variant == "auto"));
    let ours = r.iter().filter(|r| !r.rival).count();
    r.iter_mut().for_each(|r| r.roofline = 1.1);
    let mut found = Measured {
        rows: r,
        notes: vec![],
    };
    found.drop_rivals_above_the_ceiling();
    assert_eq!(found.rows.len(), ours);
    assert!(
        found
            .notes
            .iter()
            .any(|n| n.contains("gemm comes to 110 %"))
    );
}

/// Every launch of a node has its footprint, and a row has that of the launch with the most instructions.
#[test]
fn rows_have_the_longest_launchs_footprint() {
    if !crate::backend::cuda::sim_present() {
        assert!(std::env::var("CI").is_err(), "no NVRTC");
        return;
    }
    let sim = crate::backend::open("cuda:sim").unwrap();
    let case = "n=1,h=6,c=8,k=8,r=3,pad=1,bias=1";
    let cg = case_graph(&room("conv2d").unwrap().build(case).unwrap(), 1).unwrap();
    let compile = CompileOptions::default();
    let spans = traced(sim.as_ref(), &cg, &compile).unwrap();
    for arch in [80, 90] {
        let machine = Machine::Arch(arch);
        let all = sim.footprints(&cg.graph, &compile, machine).unwrap();
        assert!(paired(&spans, &all).iter().all(Option::is_some));
        let longest = longest_of(&spans, &all);
        assert_eq!(longest.len(), cg.graph.nodes.len());
        assert!(longest.values().all(|f| f.arch == arch && f.registers > 16));
        let most = |f: &&Footprint| f.kernel != "gemm.cu/column_sums";
        assert!(longest.values().all(|f| most(&f)), "{longest:?}");
        assert!(all.iter().any(|(_, f)| !most(&f)), "{all:?}");
        let full = |f: &Footprint| f.occupancy.is_some_and(|o| o.share > 0.0 && o.share <= 1.0);
        assert!(all.iter().all(|(_, f)| full(f)));
    }
}

/// A part of a case has what it needs and no more; a node that cannot catch up is given up after one run.
#[test]
fn what_is_far_behind_is_given_up() {
    let cpu = crate::backend::open("cpu").unwrap();
    let case = "n=2,h=9,c=8,k=8,r=3,pad=1";
    let cg = case_graph(&room("conv2d").unwrap().build(case).unwrap(), 1).unwrap();
    let at = |op: &str| cg.graph.nodes.iter().position(|n| n.op.name() == op);
    let wgrad = at("conv2d_wgrad").unwrap();
    let (graph, places) = part(&cg, &[wgrad]);
    assert!(graph.nodes.len() < cg.graph.nodes.len());
    assert_eq!(places.last(), Some(&wgrad));
    let options = KernelOptions {
        passes: vec![],
        all_variants: false,
        hot: true,
        rivals: false,
        machine: None,
        limits: Limits {
            warm_up: 1,
            min_runs: 5,
            precision: 0.0,
            time: Duration::from_millis(1),
        },
    };
    let runs = |beat: f64| {
        let beat = BTreeMap::from([(wgrad, beat)]);
        let compile = CompileOptions::default();
        let times = time_nodes(cpu.as_ref(), &cg, &compile, &[wgrad], &options, &beat);
        let times = times.unwrap();
        assert_eq!(times.len(), 1);
        times[&wgrad].runs
    };
    assert_eq!(runs(1e-12), 1);
    assert!(runs(10.0) >= 3);
}

#[test]
fn nothing_to_time_is_said() {
    assert!(rows("add(n=2,c=2)", &[Pass::Wgrad], false).is_err());
    assert!(rows("add(n=2,z=2)", &[], false).is_err());
}

#[test]
fn checks_take_a_smaller_batch() {
    let conv = room("conv2d").unwrap();
    let small = smaller(conv, "n=8,h=56,c=64,k=64,r=3,pad=1").unwrap();
    assert_eq!(small, "n=1,h=56,c=64,k=64,r=3,pad=1");
    assert_eq!(smaller(conv, "n=2,h=4").unwrap(), "n=2,h=4");
}
