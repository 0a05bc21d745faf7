// SPDX-License-Identifier: MIT
/// \file
/// What the page of a report shows: sections made of the data that stand in it.
#pragma once

/// The sections of the page.
inline constexpr const char* kReportSections = R"js(
const models=D.models||[],two=models.length>1,first=models[0];
const colors=["var(--accent)","var(--less)"];
const names=first?first.layers.map(l=>l.name.replace(/^layers\.(\d+)\.moe$/,"$1")):[];
let layer=0;
const redraw=[];
/// A card of the whole width, or in the shorter one of two columns.
let columns=null;
function card(title,text,wide,kind){drawAll();const c=make("section",{"class":"card"+(kind?" "+kind:""),"aria-label":title},make("h2",{},title));
  if(text)c.append(make("p",{"class":"soft"},text));
  if(wide){columns=null;$("main").append(c);return c}
  if(!columns){columns=[make("div",{}),make("div",{})];$("main").append(make("div",{"class":"columns"},...columns))}
  const height=k=>columns[k].lastChild?columns[k].lastChild.getBoundingClientRect().bottom:0;
  columns[height(1)<height(0)?1:0].append(c);return c}
/// A part of a card that is made again when the layer changes.
function changing(parent,build){const p=make("div",{"class":two?"pair":""});parent.append(p);
  const run=()=>{p.textContent="";build(p)};redraw.push(run);run()}
const titled=(m,caption)=>two?`${m.name}: ${caption}`:caption;
const layerName=m=>m.layers[layer].name;
const leftOut=p=>p.append(make("p",{"class":"soft"},"This layer is left out to keep the page small; the files beside it have its numbers."));
const sameCapacity="random routing, same capacity";
/// By chance: a dashed line of the first model, and one of the second where that is another.
function expected(o){if(!two||!o.chances[1].some((v,i)=>v!==o.chances[0][i]))return{chance:o.chances[0]};
  o.series.push({name:`${o.chanceName||"by chance"}, ${models[1].name}`,points:o.chances[1].map(v=>v==null?null:[v]),color:"var(--soft)",dash:"2 4"});
  return{chance:o.chances[0],chanceName:`${o.chanceName||"by chance"}, ${first.name}`}}
const measured=(m,i,points)=>({name:two?m.name:"measured",points,color:colors[i],dash:i?"6 3":null});
const over=(caption,get,format,o={})=>p=>{const series=models.map((m,i)=>measured(m,i,m.layers.map((_,l)=>get(m,l))));
  const chance=o.chance===null?{}:expected({series,chanceName:o.chanceName,chances:models.map(m=>m.layers.map((_,l)=>(get(m,l)||[])[3]))});
  curves(p,Object.assign({caption,x:names,format,series},o,chance))};

function summary(){if(!(D.says||[]).length)return;const c=card("In words","",true);
  c.append(make("ul",{"class":"says"},...D.says.map(([kind,text])=>make("li",{"class":kind},text))))}

function training(){const t=D.training;if(!t||!t.step.length)return;
  const c=card("Training",t.running?"The page is written anew as training goes on; this view reloads by itself.":"",true);
  const p=make("div",{"class":"pair"});c.append(p);
  const line=(caption,keys,format,o)=>{const s=keys.filter(k=>t[k[0]]&&t[k[0]].some(v=>v!=null)).map((k,i)=>({name:k[1],points:t[k[0]].map(v=>v==null?null:[v]),color:k[2]||colors[i%2]||solid(i)}));
    if(s.length)curves(p,Object.assign({caption,x:t.step,label:"Step",format,series:s,zero:false,join:true},o||{}))};
  line("Loss, bits per token",[["loss","training"],["validation","validation"]],short);
  line("Auxiliary losses",(t.losses||[]).map((n,i)=>["loss."+n,n,solid(i)]),short,{zero:true});
  line("Tokens per second",[["rate","tokens/s"]],short,{zero:true});
  line("Memory of the program, MB",[["memory","resident"]],short,{zero:true});
  line("Norm of the gradient",[["gradient","norm"]],short,{zero:true});
  const by=(key,caption,format,o)=>{if(!t.layers||!t.layers.some(l=>l[key]))return;curves(p,Object.assign({caption,x:t.step,label:"Step",format,zero:true,join:true,
    series:t.layers.map((l,i)=>({name:l.name,points:l[key].map(v=>v==null?null:[v]),color:solid(i)}))},o||{}))};
  by("imbalance","Load, largest over mean",short);by("drop","Dropped assignments",percent);by("dead","Experts without a token",short);
  by("entropy","Entropy of the router, nats",short);by("logit","Largest logit of the router",short);by("bias","Spread of the selection bias",short)}

function tokensCard(){
  const T=D.text;if(!T||!T.ids.length)return;
  const c=card("The text, token by token",`Each token is tinted by the expert it went to first. Hover over it, tap it, or use the arrow keys: all its experts and their weights are shown${two?" for both models":""}. Click a number to see one expert alone.`,true,"text");
  const unpack=m=>m.text.layers.map((l,i)=>{const raw=atob(m.text.data[i]),a=new Uint8Array(raw.length);for(let j=0;j<raw.length;j++)a[j]=raw.charCodeAt(j);return a});
  const packs=models.map(unpack),wide=packs.map((p,i)=>p[0].length/(T.ids.length*models[i].text.k));
  const shown=()=>first.text.layers.indexOf(layer);
  const at=(m,i,t,rank)=>{const b=(t*models[m].text.k+rank)*wide[m],a=packs[m][i];
    const expert=wide[m]===3?a[b]+256*a[b+1]:a[b],w=a[b+wide[m]-1];
    return w===255?null:{expert,weight:(w&127)/126,kept:w<128}};
  const tools=make("div",{"class":"tools"});
  const pick=make("select",{id:"pick"}),find=make("input",{type:"search",id:"find",placeholder:"a token, such as int",autocomplete:"off",spellcheck:"false"});
  D.domains.forEach((d,i)=>pick.append(make("option",{value:i},d)));
  tools.append(make("label",{},"Text ",pick),make("label",{},"Find ",find));
  const found=make("span",{"class":"small soft","aria-live":"polite",id:"found"});tools.append(found);c.append(tools);
  const read=make("div",{"class":"read"}),left=make("div",{"class":"pair"}),detail=make("aside",{"class":"detail",id:"detail","aria-live":"polite"},make("p",{"class":"soft"},"No token yet."));
  const fig=make("figure",{"data-points":T.ids.length},make("figcaption",{"class":"hidden"},"The text, token by token"));
  fig.append(left);read.append(fig,detail);c.append(read);
  const where=make("div",{});c.append(where);
  const chips=make("div",{"class":"chips",role:"group","aria-label":"Show one expert"});c.append(chips);
  let only=null,boxes=[],current=-1;
  const label=t=>D.tokens.text[T.ids[t]];
  function describe(t){
    detail.textContent="";detail.append(make("b",{},JSON.stringify(label(t)).slice(1,-1)),make("div",{"class":"soft small"},`token ${D.tokens.id[T.ids[t]]}, position ${T.position[t]}`));
    models.forEach((m,k)=>{if(two)detail.append(make("h3",{},m.name));const i=shown();
      if(i<0){detail.append(make("p",{"class":"soft"},"This layer is left out of the text to keep the page small."));return}
      for(let r=0;r<m.text.k;r++){const a=at(k,i,t,r);if(!a)continue;
        detail.append(make("div",{"class":"meter",style:`--h:${hue(a.expert)}`},`expert ${a.expert}`,make("i",{style:`width:${Math.max(2,100*a.weight).toFixed(0)}%`}),a.kept?a.weight.toFixed(2):"full"))}
      const list=m.text.layers.map((l,j)=>{const a=at(k,j,t,0);return `${names[l]}: ${a?a.expert:"–"}`});
      if(list.length>1)detail.append(make("p",{"class":"soft small"},"First expert by layer · "+list.join(" · ")))})}
  function mark(t){for(const b of boxes){const old=b.querySelector(".at");if(old){old.classList.remove("at");old.tabIndex=-1}
      const s=b.querySelector(`[data-t="${t}"]`);if(s){s.classList.add("at");s.tabIndex=0}}current=t;describe(t)}
  function paint(){const i=shown();boxes.forEach((b,k)=>{for(const s of b.querySelectorAll("span[data-t]")){const a=i<0?null:at(k,i,+s.dataset.t,0);
      s.classList.toggle("off",!a||(only!=null&&a.expert!==only));s.classList.toggle("lost",!!a&&!a.kept);if(a)s.style.setProperty("--h",hue(a.expert))}});
    chips.textContent="";const E=Math.max(...models.map(m=>m.layers[layer].experts));for(let e=0;e<E;e++){const b=make("button",{type:"button","aria-pressed":only===e,style:`--h:${hue(e)}`,"aria-label":`expert ${e}`},String(e));
      b.onclick=()=>{only=only===e?null:e;paint()};chips.append(b)}
    if(current>=0)describe(current)}
  function fill(){left.textContent="";boxes=[];current=-1;const d=+pick.value;
    models.forEach((m,k)=>{const box=make("div",{"class":"tokens",role:"group","aria-label":`${D.domains[d]}, ${m.name}: arrow keys go from token to token`});
      let begun=false;
      T.sequences.forEach(s=>{if(s[0]!==d)return;if(begun)box.append(make("hr",{}));begun=true;
        for(let t=s[1];t<s[2];t++){const text=label(t),span=make("span",{"data-t":t,tabindex:-1});
          if(/^(\\x[0-9A-F]{2})+$/.test(text)){span.className="esc";span.textContent=text}
          else span.textContent=text==="\n"?"⏎\n":text;box.append(span)}});
        const to=e=>{const s=e.target.closest&&e.target.closest("span[data-t]");if(s&&+s.dataset.t!==current)mark(+s.dataset.t)};
      box.addEventListener("pointerover",to);box.addEventListener("pointerdown",to);box.addEventListener("focusin",to);
      box.addEventListener("keydown",e=>{const spans=[...box.querySelectorAll("span[data-t]")];let i=spans.findIndex(s=>s===document.activeElement);if(i<0)return;
        const d={ArrowLeft:-1,ArrowRight:1,ArrowUp:-40,ArrowDown:40,Home:-1e9,End:1e9}[e.key];if(!d)return;e.preventDefault();
        spans[Math.max(0,Math.min(spans.length-1,i+d))].focus()});
      if(two)left.append(make("div",{},make("h3",{},m.name),box));else left.append(box);boxes.push(box)});paint();const begins=T.sequences.find(s=>s[0]===d&&s[2]>s[1]);if(begins)mark(begins[1]);search()}
  function search(){const q=find.value;where.textContent="";for(const b of boxes)for(const s of b.querySelectorAll(".hit"))s.classList.remove("hit");
    if(!q){found.textContent="";return}
    const exact=D.tokens.text.indexOf(q),ids=new Set();D.tokens.text.forEach((t,i)=>{if(exact>=0?t===q||t.trim()===q:t.includes(q))ids.add(i)});
    let all=0;const i=shown();const loads=models.map(m=>new Array(m.layers[layer].experts).fill(0));
    T.ids.forEach((id,t)=>{if(!ids.has(id))return;all++;if(i>=0)models.forEach((_,k)=>{const a=at(k,i,t,0);if(a)loads[k][a.expert]++})});
    let here=0;boxes.forEach((b,k)=>{let target=null;for(const s of b.querySelectorAll("span[data-t]"))if(ids.has(T.ids[+s.dataset.t])){s.classList.add("hit");if(!k)here++;target=target||s}
      if(target)b.scrollTop=Math.max(0,target.offsetTop-b.offsetTop-60)});
    found.textContent=all?`${all} times, ${here} in this text`:"not in these texts";
    if(!all)return;
    models.forEach((m,k)=>{const sum=loads[k].reduce((x,y)=>x+y,0);if(!sum)return;
      where.append(make("h3",{},`Where ${JSON.stringify(q)} goes first in ${layerName(m)}${two?", "+m.name:""}`));
      loads[k].map((n,e)=>[n,e]).sort((x,y)=>y[0]-x[0]).slice(0,6).filter(x=>x[0]).forEach(([n,e])=>where.append(
        make("div",{"class":"meter",style:`--h:${hue(e)}`},`expert ${e}`,make("i",{style:`width:${Math.max(1,100*n/sum).toFixed(0)}%`}),percent(n/sum))))})}
  pick.onchange=fill;find.oninput=search;redraw.push(()=>{paint();search()});fill()}

function loads(){
  const c=card("Load of the experts","How many of a layer's assignments each expert has, against an even share.",true);
  const p=make("div",{"class":"pair"});c.append(p);
  for(const m of models){const E=Math.max(...m.layers.map(l=>l.experts));
    heat(p,{caption:titled(m,"share of each expert by layer"),corner:"layer",rows:names,cols:[...Array(E).keys()].map(String),
      of:(r,q)=>q<m.layers[r].experts?m.load[r].share[q]:null,
      name:(r,q)=>q<m.layers[r].experts?`${m.layers[r].name}, expert ${q}`:"no such expert",than:"an even share"})}
  const q=make("div",{"class":"pair"});c.append(q);
  over("Largest load over mean",(m,l)=>m.load[l].max,short,{zero:false})(q);
  over("Variation of the load (CV)",(m,l)=>m.load[l].cv,short)(q);
  over("Entropy of the router, nats",(m,l)=>m.load[l].entropy,short,{chanceName:"undecided: ln E"})(q);
  if(models.some(m=>m.load.some(l=>l.dropped[0]>0)))over("Dropped assignments",(m,l)=>m.load[l].dropped,percent,{chanceName:sameCapacity})(q)}

function domains(){
  const c=card("Experts by text","Whether a subject or a language has experts of its own. Mixtral's authors found almost none of that by subject.",false);
  changing(c,p=>{for(const m of models){const E=m.layers[layer].experts,S=m.domain[layer];if(!S){leftOut(p);continue}
    heat(p,{caption:titled(m,`share of experts in ${layerName(m)}`),corner:"text",rows:D.domains,cols:[...Array(E).keys()].map(String),
    of:(r,q)=>S[r*E+q],name:(r,q)=>`${D.domains[r]}, expert ${q}`,than:"an even share"})}})}

function repeats(){
  const c=card("Neighbours at the same expert","How often a token and the next one of the same text choose the same expert.",false);
  over("Same first choice",(m,l)=>m.repeat[l].first[0],percent)(c);
  over("Any expert in common",(m,l)=>m.repeat[l].any[0],percent)(c);
  if(D.domains.length>1)changing(c,p=>{for(const m of models)figure(p,titled(m,`by text, ${layerName(m)}`),D.domains.length,()=>({head:["text","same first","any","chance, first","chance, any"],
    rows:D.domains.map((d,i)=>{const a=m.repeat[layer].first[i+1],b=m.repeat[layer].any[i+1];return [d,percent(a[0])+between(a,percent),percent(b[0])+between(b,percent),percent(a[3]),percent(b[3])]})}),h=>{
      D.domains.forEach((d,i)=>{const a=m.repeat[layer].first[i+1];h.append(make("div",{"class":"meter",style:`--h:${hue(i)};grid-template-columns:minmax(60px,120px) 1fr 56px`},make("span",{},d),make("i",{style:`width:${(100*(a[0]||0)).toFixed(1)}%`}),percent(a[0])))})})})}

function information(){
  const c=card("What decides","How many bits a token's identity, its position and its text tell about its first expert. The dashed lines are what the same number of tokens would seem to tell if experts were shuffled.",false);
  const kinds=[["token","token id"],["position","position"],["domain","text"]];
  const p=make("div",{});c.append(p);
  for(const m of models)curves(p,{caption:titled(m,"bits about the first expert"),x:names,format:short,
    series:kinds.map(([k,n],i)=>({name:n,points:m.info.map(l=>l[k]),color:solid(i*2+1)})),own:true,chanceName:"the same, shuffled"});
  for(const m of models)curves(p,{caption:titled(m,"spread of experts by token id and by position"),x:names,format:percent,
    series:[["token","token id"],["position","position"]].map(([k,n],i)=>({name:n,points:m.spread.map(l=>l[k]),color:solid(i*2+1)})),own:true})}

function positions(){if(!first.position||!first.position.from.length)return;
  const c=card("Along the text","Experts by position in the sequence. OpenMoE drops more and more tokens towards the end where a capacity goes by position; so does random routing, if less.",false);
  changing(c,p=>{for(const m of models){const P=m.position,E=m.layers[layer].experts;if(!P.share[layer]){leftOut(p);continue}
    const at=cells(P.share[layer]);
    heat(p,{caption:titled(m,`share of experts by position, ${layerName(m)}`),corner:"from position",rows:[...Array(E).keys()].map(String),cols:P.from.map(String),
      of:(r,q)=>at(q*E+r),name:(r,q)=>`positions from ${P.from[q]}, expert ${r}`,than:"an even share"})}});
  if(models.some(m=>m.load.some(l=>l.dropped[0]>0)))changing(c,p=>{const series=models.map((m,i)=>measured(m,i,m.position.drop[layer]));
    curves(p,Object.assign({caption:`dropped assignments by position, ${layerName(first)}`,x:first.position.from,label:"Position",format:percent,series,chanceName:sameCapacity},
      expected({series,chances:models.map(m=>m.position.drop[layer].map(e=>e[3])),chanceName:sameCapacity})))})}

function together(){if(!first.together||!first.layers.some((l,i)=>l.k>1&&first.together[i]))return;
  const c=card("Experts that work together","Of the tokens of an expert (row), the share that has another one (column) as well.",false);
  changing(c,p=>{for(const m of models){const M=m.together[layer],E=m.layers[layer].experts;
    if(!M){leftOut(p);continue}
    const at=cells(M);
    heat(p,{caption:titled(m,layerName(m)),corner:"of the tokens of",rows:[...Array(E).keys()].map(String),cols:[...Array(E).keys()].map(String),square:true,width:420,
      of:(r,q)=>r===q?null:at(r*E+q),name:(r,q)=>r===q?`expert ${r}`:`of the tokens of expert ${r}, those that go to ${q} as well`,than:"by chance"})}})}

function flows(){if(!first.flow.length)return;
  const c=card("From layer to layer","Where the tokens of each expert go next, by first choices. If a layer's choice says nothing about the next one's, all bands spread alike.",true);
  for(const m of models)flow(c,titled(m,"flow of tokens between experts"),m);
  const series=models.map((m,i)=>measured(m,i,m.flow.map(f=>f.known)));
  curves(c,Object.assign({caption:"Next expert guessed right, knowing the last one",x:first.flow.map(f=>`${names[f.from]}→${names[f.to]}`),label:"Layers",format:percent,
    series,chanceName:"shuffled"},expected({series,chances:models.map(m=>m.flow.map(f=>f.known[3])),chanceName:"shuffled"})))}

function tops(){
  const c=card("What each expert gets","The tokens that each expert is chosen for most often; the number says how many of the token's occurrences go to the expert.",true);
  changing(c,p=>{p.className="";for(const m of models){if(!m.top[layer]){leftOut(p);continue}
    const grid=make("div",{"class":"tops"});let n=0;
    m.top[layer].forEach((list,e)=>{n+=list.length;const d=make("div",{"class":"expert",style:`--h:${hue(e)}`},make("h3",{},`expert ${e} · ${percent(m.load[layer].share[e][0])}`));
      for(const [v,count,,share] of list){const k=make("code",{title:`${count} times, of its occurrences ${stated(share,percent)}`});const t=D.tokens.text[v];k.append(t==="\n"?"⏎":t===" "?"␣":t.replace(/ /g,"␣").replace(/\n/g,"⏎"),make("small",{},Math.round(100*share[0])+" %"));d.append(k)}
      if(!list.length)d.append(make("span",{"class":"soft"},"no token"));grid.append(d)});
    const f=make("figure",{"data-points":n},make("figcaption",{},titled(m,layerName(m))),grid);p.append(f)}})}

function redundancy(){if(!models.some(m=>(m.redundancy||[]).length))return;
  const c=card("Without the best experts","What a token takes if it goes without its best experts in every layer, a share of all of them. The steeper the loss rises, the less the others can stand in for them. Dashed: without as many that are drawn at random.",false);
  const series=models.map((m,i)=>measured(m,i,m.redundancy));
  curves(c,Object.assign({caption:"bits per token",x:D.masked.map(s=>(100*s).toFixed(1)+" %"),label:"Masked",format:short,zero:false,series,chanceName:"random ones"},
    expected({series,chances:models.map(m=>m.redundancy.map(e=>e[3])),chanceName:"random ones"})))}

function overlap(){if(!D.overlap||!D.overlap.some(o=>o))return;
  const c=card("Do both models agree?","For the same tokens: the share of experts in common, and of tokens with the same first expert.",true);
  const p=make("div",{"class":"pair"});c.append(p);
  for(const [k,n] of [["shared","Experts in common"],["first","Same first expert"]])curves(p,{caption:n,x:names,format:percent,series:[{name:"measured",points:D.overlap.map(o=>o&&o[k]),color:colors[0]}],chance:D.overlap.map(o=>o&&o[k][3])})}

/// What was chosen stays chosen when the page is loaded anew.
const kept={get:k=>{try{return sessionStorage.getItem("weir."+k)}catch{return null}},set:(k,v)=>{try{sessionStorage.setItem("weir."+k,v)}catch{}}};

function begin(){
  const root=document.documentElement,dark=matchMedia("(prefers-color-scheme: dark)");let theme=kept.get("theme")||"auto";
  const themed=()=>{root.dataset.theme=theme==="auto"?(dark.matches?"dark":"light"):theme;
    for(const b of document.querySelectorAll("[data-set]"))b.setAttribute("aria-pressed",b.dataset.set===theme)};
  dark.addEventListener("change",themed);
  for(const b of document.querySelectorAll("[data-set]"))b.onclick=()=>{theme=b.dataset.set;kept.set("theme",theme);themed()};
  themed();
  summary();training();
  if(first&&first.layers.length){
    tokensCard();loads();flows();domains();repeats();information();positions();together();tops();redundancy();overlap();
    const range=$("layer"),out=$("layer-name");range.max=first.layers.length-1;range.value=Math.min(+kept.get("layer")||0,first.layers.length-1);
    const set=()=>{layer=+range.value;kept.set("layer",layer);out.textContent=first.layers[layer].name+` · ${first.layers[layer].experts} experts, ${first.layers[layer].k} a token`;range.setAttribute("aria-valuetext",out.textContent)};
    range.oninput=()=>{set();for(const f of redraw)f();drawAll()};set();if(layer)range.oninput();
    if(first.layers.length===1)range.closest("label").firstChild.textContent="Layer";
  }else $("layer").closest("label").remove();
  drawAll();root.dataset.ready=1}
begin();
)js";
